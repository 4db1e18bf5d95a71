"""What each method costs when it is used: time to read text, over that of the backbone.

Speed does not depend on what was learned, so nothing is trained. Methods that leave the backbone's shape as it is cost
nothing by construction; the others are measured as they come out of training, LoRA before it is merged.
"""

from __future__ import annotations

import statistics
from typing import Any

from ..backbone import build_backbone
from ..benchmark.inference import inference_case
from ..benchmark.timing import Case, Settings, take_turns
from ..experiments import arm
from ..methods import apply_method
from ..profiles import ALL_METHODS

# Those that only change the values of the backbone's own weights.
WITHOUT_COST = ("fine_tuning", "weight_interpolation", "elastic_weight_consolidation", "distillation")


def inference_cost(profile: str, extra_ratio: float, n_rounds: int = 12, seed: int = 0) -> dict[str, Any]:
    """Study: the backbone and every method read the same batches in turn.

    Returns
    -------
    ratios : by method, its time over the backbone's in the same round, the median over the rounds; 1 for methods that
        leave the backbone's shape.
    """
    settings = Settings(profile=profile, n_rounds=n_rounds, n_steps=4)
    cases: dict[tuple[str, str], Case] = {}
    for method in ("backbone", *ALL_METHODS):
        if method in WITHOUT_COST:
            continue
        config = arm(profile, "lora" if method == "backbone" else method, extra_ratio=extra_ratio, seed=seed)
        model: Any = build_backbone(config, config.backbone.vocabulary_size, eos_token_id=0)
        if method != "backbone":
            model = apply_method(model, config.method, seed)
        cases["scoring", method] = inference_case("scoring", method, model.eval(), config, settings)
    timings = take_turns(cases, settings, progress=False)
    before = timings.pop(("scoring", "backbone"))
    ratios = {
        method: statistics.median(mine.seconds / its.seconds for mine, its in zip(rounds, before, strict=True))
        for (_, method), rounds in timings.items()
    }
    return {"ratios": {name: round(ratios.get(name, 1.0), 3) for name in ALL_METHODS}}
