"""Files that would run code, or lead elsewhere: `marker` is what their code would write."""

import os
import pickle

import torch

from real_files.json_files import make

MARKER = "marker"
REFUSED = ("holds posix.system; pickled code is not executed",)
AUDIT = "audit gt.json --images images --weights {weights} --output out"
COMPARE = "compare gt.json d.json --images images --output out --seen mug --bootstrap 10"
TRAIN_NET = (
    "train_net --config-file {recipe} {options} MODEL.WEIGHTS {file} MODEL.DEVICE cpu SEED 1 "
    "OUTPUT_DIR out DATALOADER.NUM_WORKERS 0 SOLVER.IMS_PER_BATCH 1 SOLVER.MAX_ITER 1 "
    "DATASETS.OWN \"[['{name}','gt.json','images','mug'],['{name}_t','gt.json','images','mug']]\" "
    "DATASETS.TRAIN ('{name}',) DATASETS.TEST {test} {more}"
)
PROPOSALS = (
    "MODEL.LOAD_PROPOSALS True MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals "
    "DATASETS.PROPOSAL_FILES_{part} ('p.pkl',)"
)


class Code:
    """Writes the marker where it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {MARKER}",)


def train_net(file="''", options="", more="", test="()"):
    """The line of `train_net.py`; its own fields stay for the row."""
    fields = {"recipe": "{recipe}", "name": "{name}"}
    return TRAIN_NET.format(file=file, options=options, more=more, test=test, **fields)


def dumped(content, protocol=2):
    return lambda path: path.write_bytes(pickle.dumps(content, protocol))


def saved(content, **kwargs):
    return lambda path: torch.save(content, path, **kwargs)


WEIGHTS = {"backbone.fc.weight": torch.zeros(2, 2)}
PICKLES = {
    "x.pkl": dumped({"model": {"a.b": Code()}, "__author__": "Detectron2 Model Zoo"}),
    "x.pyth": dumped({"model_state": {"a.b": Code()}}),
    "raw.pth": dumped({"model": {"a.b": Code()}}),
    "x.safetensors": dumped({"model": {"a.b": Code()}}),
    "zip.pth": saved({"model": WEIGHTS, "more": Code()}),
    "old.pth": saved({"model": WEIGHTS, "more": Code()}, _use_new_zipfile_serialization=False),
}


def with_files(*names, **changes):
    """The files of `json_files`, those of PICKLES by these names, and others by their writers."""

    def written(folder):
        make(pictures=True)(folder)
        for name in names:
            PICKLES[name](folder / name)
        for path, write in changes.items():
            path = folder / path.replace("__", "/").replace("_json", ".json").replace(
                "_pkl", ".pkl"
            )
            path.parent.mkdir(exist_ok=True)
            write(path)

    return written
