"""Write docs/scale.md: what each method costs on models and corpora of every size, by the formulas of `assay.plan`.

python scripts/scale.py
"""

from __future__ import annotations

from pathlib import Path

from assay import plan

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
SPEED = 400e12  # operations per second that one accelerator sustains
TOKENS = {"1 B": 1e9, "100 B": 1e11, "10 T": 1e13}
SETTINGS = {  # tokens of a row, rows of an optimizer step
    "GPT2-small": (1024, 512),
    "Pythia-410M": (2048, 1024),
    "Llama-3-8B": (8192, 512),
    "Llama-3-70B": (8192, 2048),
}
TARGETS, ROWS = 4, 4

HEAD = f"""# Scale

What attribution costs at sizes at which nobody wants to find out by trying. Everything on this page is arithmetic:
`python scripts/scale.py` writes it from the formulas in `assay.plan`, which `tests/plan` holds against small runs,
operations as torch counts them and bytes as the file system does. `assay plan` prints the same for your own
configuration.

How to read it: **work** is the added number of floating-point operations as a share of the training's own (for the
index: of one pass of forward and backward over the same tokens). **Time** supposes {
    SPEED / 1e12:.0f} TFLOP/s sustained
by one accelerator and says how long one of them would be busy; communication, reading and the time that a memory-bound
step takes are not in it. **Memory** is in addition to what training takes, over all devices together. In-run values:
{TARGETS} targets of {ROWS} rows each, AdamW, bf16 activations. Rows per optimizer step: {
    ", ".join(f"{name} {batch:,} × {context:,} tokens" for name, (context, batch) in SETTINGS.items())
}.

"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The page's text."""
    parts = [HEAD]
    for name, shape in plan.KNOWN.items():
        parts.append(f"## {name}\n\n{shape.parameters:,} parameters.\n")
        lines = ["| tokens | method | work | time | disk | memory |", "| --- | --- | --- | --- | --- | --- |"]
        for tokens, number in TOKENS.items():
            lines += _lines(shape, tokens, plan.Training(number, *SETTINGS[name]))
        parts.append("\n".join(lines) + "\n")
    parts.append(TAIL)
    return "\n".join(parts)


def _lines(shape: plan.Shape, tokens: str, run: plan.Training) -> list[str]:
    whole = plan.training(shape, run)
    works = {
        "the training itself": whole,
        "in-run values, `left`": plan.in_run(shape, run, TARGETS, ROWS, "left", rides=False),
        "in-run values, `trapezoid`": plan.in_run(shape, run, TARGETS, ROWS, "trapezoid"),
        "in-run values, `simpson`": plan.in_run(shape, run, TARGETS, ROWS, "simpson"),
        "in-run values, `hessian`": plan.in_run(shape, run, TARGETS, ROWS, "hessian"),
        "embeddings, rank 16": plan.embeddings(shape, run, 16),
        "index, rank 64": plan.index(shape, run.tokens, run.context, 64),
        "adjoint, one target": plan.adjoint(shape, run),
    }
    cells = [
        (
            tokens,
            what,
            plan.as_share(work.operations / whole.operations),
            plan.as_time(work.operations / SPEED),
            plan.as_bytes(work.disk),
            plan.as_bytes(work.memory),
        )
        for what, work in works.items()
    ]
    return [f"| {' | '.join(line)} |" for line in cells]


TAIL = """## What follows from it

- In-run values are the only method whose disk does not grow with the model: a dozen bytes per sample and 8 per target.
  Their work is the targets' passes, so it falls with the tokens of an optimizer step: a target is a fixed price per
  step, and the ratio of its rows to the batch's is the overhead.
- Memory is the in-run method's limit: gradients of the model's size for each target, and for all but `left` under SGD
  the step's per-sample factors until they can be valued. `memory=` chooses between keeping them and other ways,
  `target_gradient=` between ways to hold the targets' gradients ([what each takes](performance.md)).
- Embeddings and the index grow with samples × rank²: at 10 T tokens they are petabytes for the large models. Take a
  smaller rank, fewer layers, int8 rows, or a part of the corpus; the arithmetic is linear in all of them.
- The exact adjoint costs a few times the training. It is a yardstick for small runs and for parts of large ones, not
  something to do beside a pretraining run of 10 T tokens.
"""


if __name__ == "__main__":
    main()
