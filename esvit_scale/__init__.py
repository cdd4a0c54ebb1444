"""Self-supervised pretraining of multi-stage vision transformers (EsViT), from tar shards to a report.

The journey, one line a station. B images, V crops, T tokens, C width, K prototypes:

    tar shard            data/shard_writer.py, data/manifest.py     images → name.tar + manifest.json
    → order              data/order.py                              (seed, epoch, step) → which samples, at any world size
    → decoded image      data/decode.py, data/stream.py             bytes → uint8 [H, W, 3]
    → crops              data/crops.py, data/photometric.py         one tensor a resolution: [V_g, B, 3, S_g, S_g]
    → tokens             models/swin.py, models/swin_v2.py          view [V·B, C], regions [V·B·T, C], all crops in one pass
    → student/teacher    parallel/engine.py, parallel/ema.py        one forward of each; the teacher sees the 2 globals
    → loss               objective/esvit.py, objective/prototypes.py  view and region cross-entropies; no [T, K] is ever stored
    → sharded step       parallel/engine.py, train/loop.py          one optimizer update of the partitions, then EMA, then centre
    → checkpoint         checkpoint/state.py                        student, teacher, optimizer, centres, cursor: step-00000100/
                         checkpoint/convert.py                      official EsViT checkpoints and safetensors files, in and out
    → evaluation         evaluate/features.py, evaluate/knn.py      features [N, C] → k-NN accuracy
    → report             report/html.py                             one self-contained report.html

Beside it: config.py (every number of a run), models/complexity.py (what it costs), cli.py and commands/ (the command line), doctor.py (what works on this machine).
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load_backbone` (checkpoint/backbone.py) on first use: importing the package must not wait for torch."""
    if name == "load_backbone":
        return import_module("esvit_scale.checkpoint.backbone").load_backbone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
