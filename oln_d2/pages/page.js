// The page of write_page in page.py; `about` and `images` are in data.js. Boxes are [x1, y1, x2, y2].
"use strict";

const $ = (id) => document.getElementById(id);
const KINDS = ["proposals", "known", "found", "missed"]; // of boxes, each with its switch
let settings; // what the controls say
let order = images; // as they are sorted
let current = null; // the image that is enlarged

function make(tag, attributes, ...children) {
  const svg = ["svg", "g", "rect"].includes(tag);
  const element = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function area(box) {
  return (box[2] - box[0]) * (box[3] - box[1]);
}

function iou(a, b) {
  const width = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
  const height = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  if (width <= 0 || height <= 0) return 0;
  return (width * height) / (area(a) + area(b) - width * height);
}

// The proposals that can be shown, best first, and at which place in this list each object is found.
// Both hold for any number of them and any score: these only cut the list short.
function ranked(image, found) {
  const key = settings.fold ? "folded" : "all";
  if (!found[key]) {
    const kept = [];
    for (let i = 0; i < found.boxes.length; i++) {
      const better = settings.fold
        ? kept.find((other) => iou(found.boxes[other.index], found.boxes[i]) > about.iou.fold)
        : undefined;
      if (better) better.copies++;
      else kept.push({ index: i, copies: 0 });
    }
    const places = (image.objects || []).map((object) => {
      const place = kept.findIndex(({ index }) => iou(found.boxes[index], object) >= about.iou.found);
      return place < 0 ? Infinity : place;
    });
    found[key] = { kept, places };
  }
  return found[key];
}

// How many proposals are shown, and how many of the novel and the known objects they find.
function count(image, detector) {
  const { scores } = image.found[detector];
  const { kept, places } = ranked(image, image.found[detector]);
  let length = Math.min(settings.number, kept.length);
  while (length && scores[kept[length - 1].index] < settings.score) length--;
  const [novel, known] = [[0, 0], [0, 0]]; // found, all
  (image.objects || []).forEach(([, , , , seen], i) => {
    const pair = seen ? known : novel;
    pair[1]++;
    if (places[i] < length) pair[0]++;
  });
  return { length, novel, known };
}

function counted(novel, known, boxes) {
  const parts = [];
  if (novel[1]) parts.push(`${novel[0]} of ${novel[1]} novel`);
  if (known[1]) parts.push(`${known[0]} of ${known[1]} known`);
  return parts.length ? `found ${parts.join(", ")}` : `${boxes} ${boxes === 1 ? "box" : "boxes"}`;
}

// What is to be drawn, the smallest last: the mouse reaches also boxes inside others.
function listBoxes(image, detector) {
  const found = image.found[detector];
  const { kept, places } = ranked(image, found);
  const { length } = count(image, detector);
  const boxes = kept.slice(0, length).map(({ index, copies }, rank) => {
    const score = found.scores[index];
    const place = (score - about.low) / Math.max(about.high - about.low, 1e-6);
    const lines = [`proposal ${rank + 1}: score ${score.toFixed(3)}`];
    for (const [letter, meaning] of Object.entries(about.meanings)) {
      if (found[letter]) lines.push(`${letter} ${found[letter][index].toFixed(3)} (${meaning})`);
    }
    if (copies) lines.push(`${copies} near ${copies > 1 ? "copies" : "copy"} folded`);
    const color = about.colors[Math.floor(place * (about.colors.length - 0.01))];
    const weight = 0.4 + 0.7 * place ** 2;
    return { kind: "proposals", box: found.boxes[index], color, weight, text: lines.join("\n") };
  });
  (image.objects || []).forEach(([x1, y1, x2, y2, seen, name], i) => {
    const hit = places[i] < length;
    const kind = seen ? "known" : hit ? "found" : "missed";
    const text = `${name}\n${seen ? "known" : "novel"}, ${hit ? "found" : "missed"}`;
    const weight = seen ? 0.8 : 1.4;
    boxes.push({ kind, box: [x1, y1, x2, y2], color: about.kinds[kind], weight, text });
  });
  return boxes.filter(({ kind }) => settings[kind]).sort((a, b) => area(b.box) - area(a.box));
}

// On cards: quick, for there are many.
function makeCanvas(image) {
  const canvas = make("canvas", {});
  const unit = Math.min(devicePixelRatio, 2);
  const scale = (unit * 320) / Math.max(...image.size);
  canvas.draw = (boxes) => {
    canvas.boxes = boxes;
    [canvas.width, canvas.height] = image.size.map((side) => Math.max(Math.round(scale * side), 1));
    const context = canvas.getContext("2d");
    for (const { kind, box, color, weight } of boxes) {
      const [x1, y1, x2, y2] = box.map((side) => scale * side);
      const width = Math.max(2 * weight, 1);
      for (const [style, more, dash] of [["#000c", 0.6 + 1.2 * weight, []], [color, 0, [5 * unit, 4 * unit]]]) {
        context.setLineDash(kind === "missed" ? dash : []);
        context.strokeStyle = style;
        context.lineWidth = unit * (width + more);
        context.strokeRect(x1, y1, x2 - x1, y2 - y1);
      }
    }
  };
  canvas.clear = () => {
    canvas.width = canvas.height = 0; // frees memory
  };
  // The box under the mouse; the picture is in the middle of its frame.
  canvas.at = (x, y) => {
    const frame = canvas.getBoundingClientRect();
    const [width, height] = image.size;
    const unit = Math.min(frame.width / width, frame.height / height);
    x = (x - frame.left - frame.width / 2) / unit + width / 2;
    y = (y - frame.top - frame.height / 2) / unit + height / 2;
    return (canvas.boxes || []).findLast(
      ({ box }) => box[0] <= x && x <= box[2] && box[1] <= y && y <= box[3],
    );
  };
  return canvas;
}

// Of the enlarged image: each box can be reached by the keyboard.
function makeSvg(image) {
  const svg = make("svg", { viewBox: `0 0 ${image.size[0]} ${image.size[1]}` });
  svg.draw = (boxes) =>
    svg.replaceChildren(
      ...boxes.map(({ kind, box, color, weight, text }) => {
        const [x, y] = box;
        const place = { x, y, width: box[2] - x, height: box[3] - y };
        const line = make("rect", { ...place, class: "line", stroke: color });
        const about = { class: kind, role: "img", "aria-label": text, tabindex: 0 };
        const g = make("g", about, make("rect", { ...place, class: "rim" }), line);
        g.style.setProperty("--weight", weight);
        return g;
      }),
    );
  return svg;
}

// A detector's view of an image. `update` draws the boxes for what the controls say.
function makeView(image, detector, overlay) {
  const picture = make("img", { alt: "", decoding: "async" });
  const frame = make("span", { class: "frame" }, picture, overlay);
  const line = make("span", { class: "count" });
  const name = about.detectors[detector];
  const update = () => {
    overlay.draw(listBoxes(image, detector));
    const { length, novel, known } = count(image, detector);
    line.textContent = (name ? `${name}: ` : "") + counted(novel, known, length);
  };
  return { element: make("span", { class: "view" }, frame, line), frame, picture, overlay, update };
}

function makeCard(image) {
  const views = about.detectors.map((_, i) => makeView(image, i, makeCanvas(image)));
  const button = make(
    "button",
    { type: "button", "aria-label": `enlarge ${image.name}` },
    make("span", { class: "frames" }, ...views.map(({ element }) => element)),
  );
  const card = make("figure", { class: "card" }, button, make("figcaption", {}, image.name));
  button.addEventListener("click", () => enlarge(image));
  card.show = () => {
    for (const { picture, update } of views) {
      if (!picture.src) picture.src = image.small;
      update();
    }
  };
  card.clear = () => views.forEach(({ overlay }) => overlay.clear());
  return card;
}

// Only cards near the screen have boxes and thumbnails.
const near = new Set();
const observer = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) {
        near.add(target);
        target.show();
      } else if (near.delete(target)) target.clear();
    }
  },
  { rootMargin: "500px" },
);

function sort() {
  const collator = new Intl.Collator(undefined, { numeric: true });
  order = [...images].sort((a, b) => collator.compare(a.name, b.name));
  if (settings.sort !== "name") {
    const value = new Map();
    for (const image of images) {
      const counts = image.found.map((_, i) => count(image, i));
      const hits = counts.map(({ novel, known }) => (novel[1] ? novel[0] : known[0]));
      const missed = Math.max(...counts.map(({ novel }) => novel[1] - novel[0]));
      value.set(image, settings.sort === "missed" ? missed : Math.max(...hits) - Math.min(...hits));
    }
    order.sort((a, b) => value.get(b) - value.get(a));
  }
  $("images").append(...order.map((image) => image.card));
}

function sum(pairs) {
  return pairs.reduce(([a, b], [c, d]) => [a + c, b + d], [0, 0]);
}

function update() {
  for (const id of ["score", "number"]) settings[id] = Number($(id).value);
  for (const id of ["fold", ...KINDS]) settings[id] = $(id) ? $(id).checked : true;
  settings.sort = $("sort").value;
  document.querySelector("output[for=score]").value = settings.score.toFixed(2);
  document.querySelector("output[for=number]").value = settings.number;
  const totals = about.detectors.map((name, i) => {
    const counts = images.map((image) => count(image, i));
    const boxes = counts.reduce((total, { length }) => total + length, 0);
    const [novel, known] = ["novel", "known"].map((kind) => sum(counts.map((each) => each[kind])));
    return (name ? `${name}: ` : "") + counted(novel, known, boxes);
  });
  const number = `${images.length} image${images.length === 1 ? "" : "s"}`;
  $("total").textContent = [number, ...totals].join(" · ");
  for (const card of near) card.show();
  for (const view of large) view.update();
}

let large = []; // the views of the enlarged image
const viewer = $("viewer");

function enlarge(image) {
  current = image;
  const place = order.indexOf(image);
  $("viewed").textContent = `${image.name} (${place + 1} of ${order.length})`;
  $("previous").disabled = place === 0;
  $("next").disabled = place === order.length - 1;
  large = image.found.map((_, i) => makeView(image, i, makeSvg(image)));
  $("large").replaceChildren(...large.map(({ element }) => element));
  $("tip").hidden = true;
  if (!viewer.open) {
    viewer.prepend($("controls")); // to be used there, too
    viewer.append($("tip"));
    viewer.showModal();
  }
  for (const { frame, picture, update } of large) {
    frame.style.setProperty("--width", `${image.size[0]}px`);
    frame.style.setProperty("--height", `${image.size[1]}px`);
    picture.src = image.small; // at once, until the other is there
    const full = new Image();
    full.onload = () => (picture.src = full.src);
    full.onerror = () => {
      const sentence = `: ${decodeURIComponent(image.full)} cannot be opened`;
      if (current === image) $("viewed").textContent = image.name + sentence;
    };
    full.src = image.full;
    update();
  }
}

function move(step) {
  const next = order[order.indexOf(current) + step];
  if (next) enlarge(next);
}

viewer.addEventListener("close", () => {
  $("images").before($("controls"));
  document.body.append($("tip"));
  large = [];
  current.card.scrollIntoView({ block: "nearest" });
  current.card.querySelector("button").focus();
});
$("close").addEventListener("click", () => viewer.close());
$("previous").addEventListener("click", () => move(-1));
$("next").addEventListener("click", () => move(1));
$("actual").addEventListener("click", () => {
  $("actual").setAttribute("aria-pressed", viewer.classList.toggle("actual"));
});
document.addEventListener("keydown", (event) => {
  if (!viewer.open || event.target.matches("input[type=range], select")) return;
  if (event.key === "ArrowLeft") move(-1);
  else if (event.key === "ArrowRight") move(1);
});

// What a box is: where the mouse, a finger or the keyboard is.
function tell(event) {
  const { target } = event;
  const g = target.closest("g[aria-label]");
  const text = g ? g.getAttribute("aria-label") : target.at?.(event.clientX, event.clientY)?.text;
  $("tip").hidden = !text;
  if (!text) return;
  $("tip").textContent = text;
  const box = target.getBoundingClientRect();
  const x = event.clientX ?? box.left;
  const y = event.clientY ?? box.top;
  const { width, height } = $("tip").getBoundingClientRect();
  $("tip").style.left = `${Math.max(0, Math.min(x + 14, innerWidth - width - 4))}px`;
  $("tip").style.top = `${Math.max(0, y + 18 + height > innerHeight ? y - height - 10 : y + 18)}px`;
}
for (const type of ["pointermove", "pointerdown", "focusin"]) document.addEventListener(type, tell);

let waiting = false;
$("switches").addEventListener("input", () => {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    update();
  });
});
$("switches").addEventListener("change", (event) => {
  update();
  // Not while a slider moves: the images would jump.
  if (event.target.id === "sort" || settings.sort !== "name") sort();
});

const dark = $("dark");
dark.checked = matchMedia("(prefers-color-scheme: dark)").matches;
dark.addEventListener("change", () => {
  document.documentElement.style.colorScheme = dark.checked ? "dark" : "light";
});

settings = {};
$("ramp").style.background = `linear-gradient(90deg, ${about.colors.join(",")})`;
$("ramp-low").textContent = about.low.toFixed(2);
$("ramp-high").textContent = about.high.toFixed(2);
$("controls").open = innerWidth > 640;
for (const image of images) {
  image.card = makeCard(image);
  observer.observe(image.card);
}
update();
sort();
