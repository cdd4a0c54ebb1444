"""Exporting one network as a folder for other programs: weights, config.json and a model card (README.md).

| format | files beside README.md | read by |
|---|---|---|
| safetensors | model.safetensors, config.json | `esvit_scale.load_backbone` |
| timm | model.safetensors, config.json | `timm.create_model("local-dir:…")` |
| huggingface | model.safetensors, config.json, preprocessor_config.json | `transformers.AutoModel.from_pretrained` |
| onnx | model.onnx, config.json | onnxruntime and similar, any batch size |
"""

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from esvit_scale import files
from esvit_scale.checkpoint import exported_folder, libraries, model_card, safetensors_file
from esvit_scale.checkpoint.weights import TRUNK, Weights
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.models.registry import build_trunk

FOLDER_FORMATS = ("timm", "huggingface", "onnx")
DETECTORS = ("mmdet", "detectron2", "torchvision")  # libraries whose Swin takes a .pth file
MAX_BATCH = (
    2**31 - 1
)  # torch 2.7 needs a bound to export DeiT: without one it takes the graph to differ at a batch of 2**63 - 1
ONNX_INLINE = (
    2**31 - 2**27
)  # bytes; larger weights go into a separate file, because a protobuf file holds at most 2 GiB


def write(folder: Path, weights: Weights, network: str, form: str, source: Path) -> None:
    """Export one network of `weights`, with config and model card, to the new folder `folder` (atomically).

    Args:
        network: key of `weights.networks`, "teacher" or "student". Heads are written only if `form` is safetensors.
        form: the format: safetensors, timm, huggingface or onnx.
        source: where the weights were read from; if it belongs to a run dir, the model card shows the run's results.

    Raises:
        UserError: the format cannot hold this trunk, or needs a package that is not installed.
    """
    if form in ("timm", "huggingface"):
        libraries.check(weights.config, form)
    if form == "onnx":
        _require_onnx()
    with files.new_folder(folder) as tmp:
        _WRITE[form](tmp, weights, network)
        files.write_text(tmp / "README.md", model_card.text(weights, network, form, source, folder.name))
        for path in tmp.iterdir():  # the safetensors library lets only the owner read its files
            shutil.copymode(tmp / "README.md", path)


def write_for_detector(path: Path, weights: Weights, network: str, library: str) -> None:
    """Write one network's trunk to the .pth file `path` (atomically), under the names of a library of DETECTORS.

    Raises:
        UserError: the library lacks the trunk, or would compute other features with it.
    """
    content = libraries.detector_content(weights.config, library, _trunk(weights, network))
    with files.replacing(path) as tmp, tmp.open("wb") as file:  # given a path, torch would write its name into the file
        torch.save(content, file)


def _write_safetensors(folder: Path, weights: Weights, network: str) -> None:
    safetensors_file.write(folder / safetensors_file.FOLDER_WEIGHTS, weights, network)
    files.write_json(folder / "config.json", weights.config.model_dump(mode="json"))


def _write_timm(folder: Path, weights: Weights, network: str) -> None:
    _save(folder, libraries.timm_tensors(_trunk(weights, network), weights.config))
    files.write_json(folder / "config.json", libraries.timm_config(weights.config))
    exported_folder.write_origin(folder, weights, network, "timm")


def _write_huggingface(folder: Path, weights: Weights, network: str) -> None:
    _save(folder, libraries.huggingface_tensors(_trunk(weights, network), weights.config))
    files.write_json(folder / "config.json", libraries.huggingface_config(weights.config))
    files.write_json(folder / "preprocessor_config.json", libraries.huggingface_processor(weights.config))
    exported_folder.write_origin(folder, weights, network, "huggingface")


def _write_onnx(folder: Path, weights: Weights, network: str) -> None:
    size = weights.config.data.global_crops.size
    trunk = build_trunk(weights.config)
    trunk.load_state_dict(_trunk(weights, network))
    module = trunk.eval().plain(size).eval()
    with torch.no_grad():
        module(
            torch.zeros(1, trunk.in_chans, size, size)
        )  # fills tables that the forward pass caches, before the graph is traced
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    quiet = contextlib.redirect_stdout(io.StringIO())  # the exporter prints its progress
    with _one_line_errors(weights.config), warnings.catch_warnings(), quiet:
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.zeros(2, trunk.in_chans, size, size),),
            str(folder / "model.onnx"),
            input_names=["images"],
            output_names=["features", "regions"][: 1 + trunk.has_regions],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", max=MAX_BATCH)}},
            dynamo=True,
            external_data=sum(p.numel() * 4 for p in trunk.parameters()) > ONNX_INLINE,
            verbose=False,
        )
    _anonymize(folder / "model.onnx")
    files.write_json(folder / "config.json", weights.config.model_dump(mode="json"))


@contextlib.contextmanager
def _one_line_errors(config: Config) -> Iterator[None]:
    """Re-raise a failure of torch's ONNX exporter, whose message is a page long, as a one-line UserError."""
    try:
        yield
    except torch.onnx.errors.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(
            f"--to onnx: torch {torch.__version__} cannot export {config.model.trunk} ({cause}); "
            "try a newer torch, or --to safetensors, which needs no exporter"
        ) from error


def _anonymize(path: Path) -> None:
    """Remove the metadata of an ONNX file in which torch records the local source file of every node.

    A separate file of large weights is not changed.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    graphs = [model.graph, *model.functions]
    for graph in graphs:  # the list grows while it is read, because nodes such as If contain graphs
        values = [*getattr(graph, "initializer", []), *graph.value_info]
        values += [] if isinstance(graph, onnx.FunctionProto) else [*graph.input, *graph.output]
        for part in (graph, *graph.node, *values):
            for field in {"metadata_props", "doc_string"} & set(part.DESCRIPTOR.fields_by_name):
                part.ClearField(field)
        for attribute in (a for node in graph.node for a in node.attribute):
            graphs += [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs
    model.ClearField("metadata_props")
    model.ClearField("doc_string")
    onnx.save(model, path)


_WRITE = {
    "safetensors": _write_safetensors,
    "timm": _write_timm,
    "huggingface": _write_huggingface,
    "onnx": _write_onnx,
}


def _trunk(weights: Weights, network: str) -> dict[str, torch.Tensor]:
    return {n.removeprefix(TRUNK): t for n, t in weights.networks[network].items() if n.startswith(TRUNK)}


def _save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    safetensors_file.save(folder / safetensors_file.FOLDER_WEIGHTS, tensors, {"format": "pt"})


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--to onnx: {error.name} is not installed; install it with pip install 'esvit-scale[export]'"
        ) from None
