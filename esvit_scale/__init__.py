"""Self-supervised pretraining of multi-stage vision transformers (EsViT), from tar shards to a report.

The pipeline, one line per stage. B images, V crops, T tokens, C width, K prototypes:

    images               data/sources/, data/shard_plan.py           folders, lists, tables, archives, in a stable order
    → tar shard          data/shard_writer.py, data/manifest.py     name.tar + manifest.json
                         data/remote/                               the same set in an object store, through a cache on the node
    → order              data/order.py                              (seed, epoch, step) → which samples, at any world size
    → decoded image      data/picture.py, data/decode.py            bytes → uint8 [H, W, 3], no larger than the crops need
    → crops              data/crops.py, data/worker_batch.py, data/photometric.py  one tensor per resolution: [V_g, B, 3, S_g, S_g]
                         data/signals.py, data/media.py             sound, video and text beside them: [V, B, …]
    → batches            data/stream.py, data/shard_stream.py, data/url_stream.py  this rank's part of a global batch
    → tokens             models/registry.py, models/swin.py, …      view [V·B, C], regions [V·B·T, C], all crops in one pass
    → student/teacher    parallel/engine.py, parallel/ema.py        one forward of each; the teacher sees the 2 globals
    → loss               objective/registry.py, objective/esvit.py, …  view and region cross-entropies, or another objective's
                         objective/prototypes.py, objective/prototype_tiles.py, objective/prototype_triton.py  no [T, K] is ever stored
    → sharded step       train/trainer.py, parallel/zero.py         one optimizer update of the partitions, then EMA, then centre
    → checkpoint         checkpoint/saver.py, checkpoint/state.py   student, teacher, optimizer, centres, cursor: step-00000100/
                         checkpoint/mirror.py                       a copy in an object store
                         checkpoint/convert.py, checkpoint/export.py  official EsViT, safetensors, timm, Hugging Face, ONNX
    → evaluation         evaluate/features.py, evaluate/feature_cache.py    images → features [N, C], once
                         evaluate/knn.py, evaluate/linear.py, evaluate/transfer.py  accuracy with intervals
                         evaluate/retrieval.py, evaluate/revisited.py    what a query finds, mAP
                         evaluate/modalities.py                          what the modalities of a sample find of each other
                         evaluate/copies.py, evaluate/micro_precision.py  originals of distorted copies, µAP
                         evaluate/segmentation.py, evaluate/stage_features.py, evaluate/pixel_heads.py  masks [H, W], mIoU
                         evaluate/depth.py, evaluate/depth_head.py       stage maps → depth [H, W], RMSE, δ1
                         evaluate/video.py, evaluate/propagation.py      masks of first frames → masks of all, J&F
                         evaluate/correspondence.py, evaluate/attention.py  what the tokens see
    → report             report/html.py, report/evaluation_figures.py         one self-contained report.html
    → scaling            scaling/plan.py, scaling/cells.py, scaling/fit.py  what a run needs; sizes × budgets → a law with intervals

Other modules: config.py and run_keys.py (every number of a run), models/traced.py and objective/costs.py (what a run costs), cli.py
and commands/ (the command line), doctor.py (what works on this machine), feed.py (whether the machine loads data fast
enough for its GPUs), launch.py and slurm_status.py (jobs under Slurm), api.py and
shards.py (the commands as Python functions).
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


# Name → module that has it; imported on first use, since importing the package must not load torch.
_LAZY = {
    "load_backbone": "esvit_scale.checkpoint.backbone",
    "load_classifier": "esvit_scale.checkpoint.classifier",
    "pretrain": "esvit_scale.api",
    "finetune": "esvit_scale.api",
    "embed": "esvit_scale.api",
    "evaluate_knn": "esvit_scale.api",
    "plan": "esvit_scale.api",
    "Embeddings": "esvit_scale.api",
}


def __getattr__(name: str) -> Any:
    """Import a name of the Python API on first use: a function, or the module `shards`."""
    if name == "shards":
        return import_module("esvit_scale.shards")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
