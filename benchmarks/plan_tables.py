"""The tables of docs/plan_at_scale.md, from `esvit-scale plan`: SwinV2-1B and -G on 64 and 512 GPUs, and weak scaling.

    python benchmarks/plan_tables.py             # writes the tables into docs/plan_at_scale.md; no GPU, about a minute
    python benchmarks/plan_tables.py --print swinv2_1b-64

Nothing is measured here. The tables say what the plan says, with every assumption; a test compares them with the code.
"""

import argparse
from pathlib import Path

from esvit_scale import config as configs
from esvit_scale.objective import costs
from esvit_scale.scaling import memory, roofline, step_trace
from esvit_scale.scaling import plan as plans
from esvit_scale.scaling.roofline import Machine

PAGE = Path(__file__).parents[1] / "docs" / "plan_at_scale.md"
PRESETS = ("swinv2_1b", "swinv2_g")
GPUS = (64, 512)
CAPACITY = 80 * 2**30
MACHINE = Machine(600.0, "600 TFLOP/s for each GPU assumed")  # of an H100 SXM: its data sheet says 989
IMAGES = 8  # on each GPU, of the weak scaling
WORLDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
NODE = 8  # GPUs that have an efficiency of 100 %
PARTS = 6  # of a step that a table names


def section(preset: str, gpus: int) -> str:
    """The tables of one preset on so many GPUs, at its own batch."""
    config = configs.resolve(preset)
    found = plans.plan(config, gpus, CAPACITY, None, MACHINE, traced=True)
    assert found.step is not None
    assert found.step.estimate is not None
    lines = [f"### {preset} on {gpus} GPUs, global batch {config.train.global_batch}", ""]
    lines += ["| setting | state, GiB | peak, GiB | fits |", "|---|---|---|---|"]
    for setting in found.settings:
        fits = "yes" if setting.memory.peak <= plans.HEADROOM * CAPACITY else "no"
        state, peak = setting.memory.state / plans.GIB, setting.memory.peak / plans.GIB
        lines.append(f"| {setting.name} | {state:.2f} | {peak:.2f} | {fits} |")
    step, estimate, numbers = found.step, found.step.estimate, found.numbers
    lines += [
        "",
        f"Traced with {step.setting.name}: peak {step.setting.memory.peak / plans.GIB:.2f} GiB, "
        f"{estimate.kernels:,} kernels, {estimate.flops / 1e12:.1f} TFLOP and {estimate.bytes / 1e9:.0f} GB read and "
        f"written on each GPU. A step takes {1e3 * estimate.seconds:.1f} ms: {numbers['images_per_s']:,.0f} images/s, "
        f"{numbers['hours_per_epoch'] * 60:.1f} minutes for an epoch of ImageNet-1K, MFU {numbers['speed']['mfu']:.2f}.",
        "",
        "| part of the step | ms | share | limited by |",
        "|---|---|---|---|",
    ]
    rest = estimate.terms[PARTS:]
    for term in estimate.terms[:PARTS]:
        lines.append(
            f"| {term.name} | {1e3 * term.seconds:.2f} | {term.seconds / estimate.seconds:.0%} | {term.limit} |"
        )
    others = sum(term.seconds for term in rest)
    lines.append(f"| {len(rest)} others | {1e3 * others:.2f} | {others / estimate.seconds:.0%} | |")
    lines += ["", "| traffic of a step | kind | MiB | sent by a GPU, MiB | source |", "|---|---|---|---|---|"]
    for said in sorted(step.traffic, key=lambda one: -one.bytes):
        sent = said.wire(gpus) / 2**20
        lines.append(
            f"| {said.purpose} | {said.kind.replace('_', '-')} | {said.bytes / 2**20:,.3f} | {sent:,.3f} | {said.source} |"
        )
    return "\n".join(lines) + "\n"


def weak_scaling(preset: str) -> str:
    """The table of images per second at a constant number of images per GPU, by ZeRO stage where it fits."""
    of_largest = configs.resolve(preset, [f"train.global_batch={IMAGES * WORLDS[-1]}"])
    network = memory.network_of(of_largest)
    kept = costs.checkpointing_of(of_largest)
    step = step_trace.trace(of_largest, WORLDS[-1], kept, step_trace.kernels_on_gpu(of_largest, CAPACITY))
    lines = [
        f"### {preset}, {IMAGES} images a GPU, activation checkpointing {of_largest.train.activation_checkpointing}",
        "",
        "| GPUs | zero1, 2: ms a step | images/s | efficiency | zero3: ms a step | images/s | efficiency |",
        "|---|---|---|---|---|---|---|",
    ]
    of_node: dict[int, float] = {}
    for world in WORLDS:
        config = configs.resolve(preset, [f"train.global_batch={IMAGES * world}"])
        cells = []
        for stage in (1, 3):
            needed = memory.memory(config, network, stage, world, kept, capacity=CAPACITY, traced=step.peaks)
            if needed.peak > plans.HEADROOM * CAPACITY:
                cells += ["does not fit", "", ""]
                continue
            seconds = roofline.estimate(config, network, stage, world, step, MACHINE).seconds
            each = IMAGES / seconds
            if world >= NODE:
                of_node.setdefault(stage, each)
            share = f"{each / of_node[stage]:.0%}" if stage in of_node else ""
            cells += [f"{1e3 * seconds:.1f}", f"{world * each:,.0f}", share]
        lines.append(f"| {world} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def sections() -> dict[str, str]:
    """All tables, by name."""
    found = {f"{preset}-{gpus}": section(preset, gpus) for preset in PRESETS for gpus in GPUS}
    return found | {f"{preset}-weak": weak_scaling(preset) for preset in PRESETS}


def one(name: str) -> str:
    """The tables of one name."""
    preset, kind = name.rsplit("-", 1)
    return weak_scaling(preset) if kind == "weak" else section(preset, int(kind))


def between(text: str, name: str) -> tuple[int, int]:
    """Where the tables of one name are in the page: begin and end."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    return text.index(begin) + len(begin), text.index(end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", metavar="NAME", help="print one of the tables and write nothing")
    options = parser.parse_args()
    if options.print:
        print(one(options.print))
        return
    text = PAGE.read_text(encoding="utf-8")
    for name, content in sections().items():
        begin, end = between(text, name)
        text = text[:begin] + content + text[end:]
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
