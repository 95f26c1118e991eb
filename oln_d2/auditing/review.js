// The page of review.py; `audit` in data.js has the candidates. Boxes are [x, y, width, height].
"use strict";

const $ = (id) => document.getElementById(id);
const { candidates, images, categories, id: auditId } = audit;
const KEY = `oln-d2 audit ${auditId}`; // in the browser's storage
const ANNOTATED = "#33c3ff";
const CANDIDATE = "#ffd23d";
const GRAB = 8; // pixels of the screen beside a side, from where it can be dragged
const CONTEXT = 0.6; // of the candidate's longer side, shown around it
const CORNERS = [null, "left upper", "right lower"]; // that the arrows move
const shown = categories.slice(0, 10); // those with a digit: the most frequent

let decisions = {}; // by the candidate's id, also of those that are no longer listed
let history = []; // ids, as they were decided; and what was there before
let order = []; // indices of candidates
let at = 0; // place in `order`
let hidden = false;
let kept = true; // by the browser
let corner = 0; // of CORNERS
let boxes = {}; // adjusted, not yet decided, by the candidate's id
const pictures = new Map(); // by file

function load() {
  try {
    ({ decisions, history } = JSON.parse(localStorage.getItem(KEY)) || { decisions, history });
  } catch {
    kept = false;
  }
  // Those of candidates that are no longer listed cannot be gone back to.
  history = history.filter(([id]) => candidates.some((candidate) => candidate.id === id));
}

function store() {
  try {
    localStorage.setItem(KEY, JSON.stringify({ decisions, history }));
  } catch {
    kept = false;
  }
}

const current = () => candidates[order[at]];
const boxOf = (candidate) =>
  boxes[candidate.id] || (decisions[candidate.id] || {}).bbox || candidate.bbox;

function picture(image) {
  if (!pictures.has(image.file)) {
    const element = new Image();
    element.onload = element.onerror = () => draw();
    element.src = image.file;
    pictures.set(image.file, element);
  }
  return pictures.get(image.file);
}

function sort() {
  const kept = at < order.length ? current() : null;
  order = candidates.map((_, i) => i);
  if ($("order").value === "score") order.sort((a, b) => candidates[b].score - candidates[a].score);
  at = kept ? order.indexOf(candidates.indexOf(kept)) : 0;
}

// The next one without a decision, from here on and then from the start; then those skipped.
function advance() {
  const what = (i) => (decisions[candidates[i].id] || {}).what;
  const open = (i) => !what(i);
  const skipped = (i) => what(i) === "skip";
  const next = [open, skipped]
    .flatMap((wanted) => [
      order.findIndex((i, place) => place > at && wanted(i)),
      order.findIndex(wanted),
    ])
    .find((place) => place >= 0);
  at = next === undefined ? order.length : next;
  corner = 0;
}

function decide(what, categoryId = null) {
  if (at >= order.length) return;
  const { id, image, bbox } = current();
  history.push([id, decisions[id] || null]);
  decisions[id] = {
    what,
    image_id: images[image].id,
    category_id: categoryId,
    bbox: boxOf(current()),
    proposed: bbox,
  };
  store();
  advance();
  show();
}

function undo() {
  if (!history.length) return;
  const [id, before] = history.pop();
  if (before) decisions[id] = before;
  else delete decisions[id];
  at = order.findIndex((i) => candidates[i].id === id);
  corner = 0;
  store();
  show();
}

function go(step) {
  at = Math.max(Math.min(at + step, order.length - 1), 0);
  corner = 0;
  show();
}

function move(dx, dy) {
  const candidate = current();
  let [x, y, width, height] = boxOf(candidate);
  if (corner === 1) [x, y, width, height] = [x + dx, y + dy, width - dx, height - dy];
  else [width, height] = [width + dx, height + dy];
  setBox(candidate, x, y, width, height);
}

function setBox(candidate, x, y, width, height) {
  const image = images[candidate.image];
  const right = Math.min(x + width, image.width);
  const below = Math.min(y + height, image.height);
  [x, y] = [Math.max(x, 0), Math.max(y, 0)];
  if (right - x >= 1 && below - y >= 1) boxes[candidate.id] = [x, y, right - x, below - y];
  draw();
}

// What part of the image a canvas shows, and where: screen = (image - left, top) * scale + shift.
function frame(canvas, [left, top, width, height]) {
  const ratio = devicePixelRatio || 1;
  const { clientWidth, clientHeight } = canvas;
  canvas.width = clientWidth * ratio;
  canvas.height = clientHeight * ratio;
  const scale = Math.min(clientWidth / width, clientHeight / height) || 1;
  const shift = [(clientWidth - width * scale) / 2, (clientHeight - height * scale) / 2];
  return { left, top, width, height, scale, shift, ratio };
}

function paint(canvas, part, candidate) {
  const image = images[candidate.image];
  const view = frame(canvas, part);
  canvas.view = view;
  const context = canvas.getContext("2d");
  context.scale(view.ratio, view.ratio);
  context.translate(...view.shift);
  const element = picture(image);
  const { left, top, width, height, scale } = view;
  if (element.complete && element.naturalWidth) {
    context.save();
    context.beginPath();
    context.rect(0, 0, width * scale, height * scale);
    context.clip();
    context.drawImage(element, -left * scale, -top * scale, image.width * scale, image.height * scale);
    context.restore();
  }
  if (hidden) return;
  const outline = ([x, y, w, h], color, line, dash = []) => {
    for (const [style, wider] of [["#000c", 2], [color, 0]]) {
      context.setLineDash(style === color ? dash : []);
      context.strokeStyle = style;
      context.lineWidth = line + wider;
      context.strokeRect((x - left) * scale, (y - top) * scale, w * scale, h * scale);
    }
  };
  context.font = "12px system-ui, sans-serif";
  for (const [x, y, w, h, name] of image.annotations) {
    outline([x, y, w, h], ANNOTATED, 1.5, [6, 4]);
    const [left_, top_] = [(x - left) * scale, (y - top) * scale];
    context.fillStyle = "#000b";
    context.fillRect(left_, top_, context.measureText(name).width + 6, 16);
    context.fillStyle = ANNOTATED;
    context.fillText(name, left_ + 3, top_ + 12);
  }
  outline(boxOf(candidate), CANDIDATE, 3);
}

function draw() {
  if (at >= order.length) return;
  const candidate = current();
  const image = images[candidate.image];
  const element = picture(image);
  $("missing").hidden = !(element.complete && !element.naturalWidth);
  $("missing").textContent = `${image.name} cannot be shown`;
  paint($("whole"), [0, 0, image.width, image.height], candidate);
  const [x, y, w, h] = boxOf(candidate);
  const around = CONTEXT * Math.max(w, h);
  paint($("crop"), [x - around, y - around, w + 2 * around, h + 2 * around], candidate);
}

function show() {
  const made = Object.values(decisions);
  const count = (what) => made.filter((decision) => decision.what === what).length;
  const done = candidates.filter(({ id }) => decisions[id]).length;
  const end = at >= order.length;
  const warning = kept ? "" : " · this browser keeps nothing: save before you leave";
  const place = end ? "all decided" : `candidate ${at + 1} of ${order.length}`;
  $("state").textContent =
    `${place} · ${count("accept")} accepted, ${count("reject")} rejected, ${count("skip")} skipped${warning}`;
  $("bar").firstElementChild.style.width = `${(100 * done) / Math.max(candidates.length, 1)}%`;
  $("edit").setAttribute("aria-pressed", corner > 0);
  const decision = end ? null : decisions[current().id];
  for (const view of document.querySelectorAll(".view")) {
    view.className = `view ${decision ? decision.what : ""}`;
    view.style.visibility = end ? "hidden" : "visible";
  }
  if (end) {
    $("about").textContent = "Save the decisions, or go back with the left arrow.";
    return;
  }
  const { image, score, inside } = current();
  const part = inside >= 0.5 ? `, ${Math.round(100 * inside)} % inside an annotation` : "";
  const editing = corner ? ` · the arrows move the ${CORNERS[corner]} corner` : "";
  $("about").textContent = `${images[image].name} · score ${score.toFixed(3)}${part}${editing}`;
  draw();
  const next = order[at + 1];
  if (next !== undefined) picture(images[candidates[next].image]);
}

// All decisions of this audit as a file, those of earlier lists as well.
function save() {
  const list = Object.entries(decisions).map(([id, decision]) => ({ id, ...decision }));
  const text = JSON.stringify({ audit: auditId, decisions: list }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "decisions.json";
  link.click();
  URL.revokeObjectURL(link.href);
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function press(key) {
  if (key === "a") decide("accept");
  else if (key === "x") decide("reject");
  else if (key === " ") decide("skip");
  else if (key === "Backspace") undo();
  else if (key === "?") $("help").hidden = !$("help").hidden;
  else if (key === "e" && at < order.length) {
    corner = (corner + 1) % CORNERS.length;
    show();
  } else if (/^[0-9]$/.test(key)) {
    const category = shown[(Number(key) + 9) % 10];
    if (category) decide("accept", category.id);
  } else if (ARROWS[key] && corner) move(...ARROWS[key]);
  else if (key === "ArrowLeft" || key === "ArrowUp") go(-1);
  else if (key === "ArrowRight" || key === "ArrowDown") go(1);
  else return false;
  return true;
}

document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, select") || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.repeat && !ARROWS[event.key]) return; // a key held decides on one
  if (event.key === "Shift") {
    hidden = true;
    draw();
  } else if (press(event.key.length === 1 ? event.key.toLowerCase() : event.key)) {
    event.preventDefault(); // a focused button would be pressed by space as well
  }
});
document.addEventListener("keyup", (event) => {
  if (event.key === "Shift" && hidden) {
    hidden = false;
    draw();
  }
});
addEventListener("resize", draw);
for (const button of document.querySelectorAll("[data-key]")) {
  button.addEventListener("click", () => press(button.dataset.key));
}
$("save").addEventListener("click", save);
$("order").addEventListener("change", () => {
  $("order").blur(); // for the keys
  sort();
  show();
});
$("filter").addEventListener("keydown", ({ key }) => {
  const category = categories.find(({ name }) => name === $("filter").value);
  if (key === "Enter" && category) {
    $("filter").value = "";
    $("filter").blur();
    decide("accept", category.id);
  } else if (key === "Escape") $("filter").blur();
});

// A side of the candidate, dragged in the whole image.
$("whole").addEventListener("pointerdown", (event) => {
  if (at >= order.length) return;
  const candidate = current();
  const { scale, shift } = $("whole").view;
  const point = (e) => [(e.offsetX - shift[0]) / scale, (e.offsetY - shift[1]) / scale];
  const [x, y, w, h] = boxOf(candidate);
  const [px, py] = point(event);
  const near = GRAB / scale;
  const inX = px > x - near && px < x + w + near;
  const inY = py > y - near && py < y + h + near;
  const sides = {
    left: inY && Math.abs(px - x) < near,
    right: inY && Math.abs(px - x - w) < near,
    top: inX && Math.abs(py - y) < near,
    bottom: inX && Math.abs(py - y - h) < near,
  };
  if (!Object.values(sides).some(Boolean)) return;
  $("whole").setPointerCapture(event.pointerId);
  const drag = (e) => {
    const [qx, qy] = point(e);
    const [left, top] = [sides.left ? qx : x, sides.top ? qy : y];
    const right = sides.right ? qx : x + w;
    const bottom = sides.bottom ? qy : y + h;
    setBox(candidate, left, top, right - left, bottom - top);
  };
  $("whole").addEventListener("pointermove", drag);
  const end = () => $("whole").removeEventListener("pointermove", drag);
  $("whole").addEventListener("pointerup", end, { once: true });
});

shown.forEach(({ id, name }, i) => {
  const button = document.createElement("button");
  button.type = "button";
  const digit = document.createElement("kbd");
  digit.textContent = (i + 1) % 10;
  button.append(digit, ` ${name}`);
  button.addEventListener("click", () => decide("accept", id));
  $("categories").append(button);
});
for (const { name } of categories) {
  const option = document.createElement("option");
  option.value = name;
  $("names").append(option);
}
$("summary").textContent = audit.summary;
load();
sort();
at = -1;
advance();
show();
