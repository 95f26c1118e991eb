"""
Takes 10,000 images of 64 px through `oln-d2 propose` in two shards and through Ray with two
workers, kills a worker of each on the way, and checks that both have proposed on every image once,
and the same:

    python tools/many_images.py --folder /tmp

Prints seconds and images a second of a worker, the start of the processes and what was lost by the
kill included. Needs the extra `ray`; Linux only, as it finds the processes in /proc.
"""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from oln_d2.boxes import to_xywh

ROOT = Path(__file__).parents[1]
SIDE = 64
FILES = 40  # of Parquet
KILL_AT = 0.3  # share of a shard that is done when it is killed
MARK = "OLN_D2_MANY_IMAGES"  # in the environment of our processes


def make_images(folder, number):
    """The same as files in `photos/` and as rows of Parquet files in `rows/`."""
    photos, rows = folder / "photos", folder / "rows"
    photos.mkdir()
    rows.mkdir()
    rng = np.random.default_rng(0)
    content = {}
    for i in tqdm(range(number), desc="making images", disable=None):
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
        image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        content[f"{i:06d}.jpg"] = file.getvalue()
        (photos / f"{i:06d}.jpg").write_bytes(file.getvalue())
    names = list(content)
    for part in range(FILES):
        own = names[part::FILES]
        columns = {"file_name": own, "image": pa.array([content[n] for n in own], pa.binary())}
        pq.write_table(pa.table(columns), rows / f"{part:03d}.parquet")


def start(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: str(os.getpid())}
    environment["RAY_worker_niceness"] = "0"  # as the other processes
    # Also of workers that Ray starts elsewhere.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment)


def finish(*processes):
    if any(process.wait() for process in processes):
        raise SystemExit("a process failed, see above")


def wait_until(done, process):
    while not done():
        if process.poll() is not None:
            raise SystemExit("too few images: all were done before a worker could be killed")
        time.sleep(0.05)


def in_shards(folder, number, options):
    """Seconds until the shard that nobody killed was done, and until all were."""
    output = folder / "shards"
    command = ["-m", "oln_d2", "propose", folder / "photos", "--output", output, *options]
    begin = time.monotonic()
    first, second = (start(*command, "--shard", f"{shard}/2") for shard in (1, 2))
    journal = output / "journal-2-of-2.jsonl"
    wait_until(
        lambda: journal.exists() and journal.read_bytes().count(b"\n") > KILL_AT * number / 2,
        second,
    )
    second.kill()
    second.wait()
    print(f"killed shard 2 after {time.monotonic() - begin:.0f} s", flush=True)
    finish(first)
    undisturbed = time.monotonic() - begin
    if (output / "results.json").exists():
        raise SystemExit("results were written before all shards were done")
    finish(start(*command, "--shard", "2/2"))
    return undisturbed, time.monotonic() - begin


def by_ray(folder, options):
    output = folder / "ray"
    script = ROOT / "examples/propose_with_ray.py"
    begin = time.monotonic()
    process = start(script, folder / "rows", output, "--workers", 2, *options)
    wait_until(lambda: output.exists() and len(os.listdir(output)) >= 3, process)
    os.kill(workers()[0], signal.SIGKILL)
    print(f"killed a worker of Ray after {time.monotonic() - begin:.0f} s", flush=True)
    finish(process)
    return time.monotonic() - begin


def workers():
    """The processes of Ray that have a model."""
    ret = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_worker = b"BatchProposer" in (folder / "cmdline").read_bytes()
            is_own = f"{MARK}={os.getpid()}".encode() in (folder / "environ").read_bytes()
        except OSError:
            continue
        if is_worker and is_own:
            ret.append(int(folder.name))
    return ret


def compare(folder, number):
    """Every image once in both, and with the same boxes and scores. Returns how many boxes."""
    output = folder / "shards"
    images = json.loads((output / "images.json").read_text())["images"]
    found = {image["id"]: ([], []) for image in images}
    for entry in json.loads((output / "results.json").read_text()):
        boxes, scores = found[entry["image_id"]]
        boxes.append(entry["bbox"])
        scores.append(entry["score"])
    by_name = {image["file_name"]: found[image["id"]] for image in images}
    rows = pq.read_table(folder / "ray", columns=["file_name", "boxes", "scores", "error"])
    rows = rows.to_pylist()
    names = sorted(row["file_name"] for row in rows)
    if not (names == sorted(by_name) and len(names) == len(set(names)) == number):
        raise SystemExit("an image is missing or there twice")
    for row in rows:
        boxes = to_xywh(np.array(row["boxes"]).reshape(-1, 4)).tolist()
        if row["error"] or (boxes, row["scores"]) != by_name[row["file_name"]]:
            raise SystemExit(f"{row['file_name']}: the proposals differ")
    return sum(len(row["scores"]) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().partition(":\n")[0])
    parser.add_argument("--folder", default=None, help="default: /tmp")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--min-size", type=int, default=32, help="as of oln-d2 propose")
    args = parser.parse_args()
    options = ["--min-size", args.min_size, "--top-k", 20]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        make_images(folder, args.images)
        alone, all_shards = in_shards(folder, args.images, options)
        ray = by_ray(folder, options)
        boxes = compare(folder, args.images)
    print(f"Both have proposed on all {args.images} images once, and the same {boxes} boxes.")
    print(f"Two shards: {all_shards:.0f} s, the second done anew after the first, which did")
    print(f"  {args.images / 2 / alone:.1f} images a second, both at work at first")
    print(f"Ray, two workers: {ray:.0f} s, {args.images / 2 / ray:.1f} images a second each")


if __name__ == "__main__":
    main()
