"""What is compared in evidence.py: recipes, and experiments of them with what was expected before they ran."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from light import Protocol, Recipe

from nnunetv2_cva.config import CVAConfig

ADAMW: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.01, "warmup_epochs": 2, "mask_block": 8}
INDEPENDENT = {**ADAMW, "spatial": "independent"}
MAE = {**ADAMW, "consistency_weight": 0.0, "contrastive_weight": 0.0}
DEMO: dict[str, Any] = {"cases": 2, "images": 40, "view": (32, 40, 32)}
WIDE = (32, 64, 128, 256)  # features: four times the others', and the package's own heads
WIDE_HEADS = {name: getattr(CVAConfig(), name) for name in ("head_width", "predictor_width")}
SCRATCH = "scratch"
RECIPES = {
    "sgd": Recipe({"mask_block": 16}),  # nnUNetTrainerCVA_Paper, the default of version 0.1: blocks of 16, SGD 1e-2
    "paper": Recipe({"mask_block": 16}),  # the same again: two of three "sgd" were trained by an earlier state of the code
    "adamw": Recipe(ADAMW),
    "independent": Recipe(INDEPENDENT),
    "mae": Recipe(MAE),
    "ccva": Recipe({**INDEPENDENT, "consistency": "nt_xent", "consistency_weight": 0.2, "contrastive_weight": 0.0}),
    "misaligned": Recipe(ADAMW, misaligned=True),
    "cva alone": Recipe({**INDEPENDENT, "reconstruction_weight": 0.0, "contrastive_weight": 0.0}),
    "mae+cva": Recipe({**INDEPENDENT, "contrastive_weight": 0.0}),
    # one factor each
    "adamw block 16": Recipe({**ADAMW, "mask_block": 16}),
    "independent 3e-3": Recipe({**INDEPENDENT, "learning_rate": 3e-3}),
    "independent 3e-4": Recipe({**INDEPENDENT, "learning_rate": 3e-4}),
    "sgd 1e-3": Recipe({"mask_block": 16, "learning_rate": 1e-3}),
    "adamw no warm-up": Recipe({**ADAMW, "warmup_epochs": 0}),
    "adamw 400": Recipe(ADAMW, iterations=400),
    "mae 2400": Recipe(MAE, iterations=2400),
    "independent 2400": Recipe(INDEPENDENT, iterations=2400),
    "adamw 2 cases": Recipe(ADAMW, cases=2),
    # the demo's: 40 images, 2 cases a step, views of 32x40x32
    "demo": Recipe(ADAMW, iterations=400, **DEMO),
    "demo 1200": Recipe(ADAMW, iterations=1200, **DEMO),
    "demo block 16": Recipe({**ADAMW, "mask_block": 16}, iterations=400, **DEMO),
    "demo independent": Recipe(INDEPENDENT, iterations=400, **DEMO),
    "demo mae": Recipe(MAE, iterations=400, **DEMO),
    # wider networks, for a GPU
    "wide independent": Recipe({**INDEPENDENT, **WIDE_HEADS}, widths=WIDE),
    "wide mae": Recipe({**MAE, **WIDE_HEADS}, widths=WIDE),
    "wide paper": Recipe(WIDE_HEADS, widths=WIDE),
}


@dataclass(frozen=True)
class Experiment:
    """``expected``: written before the run."""

    expected: str
    recipes: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    splits: tuple[int, ...] = (0, 1, 2, 3, 4)
    labels: tuple[int, ...] = (1, 4)
    protocol: Protocol = field(default_factory=Protocol)
    data: str = "hippocampus"
    against: str | None = None  # the recipe that the others are compared with; None: scratch


LABELS = (SCRATCH, "independent", "mae", "adamw", "misaligned", "paper")
MAIN = (SCRATCH, "sgd", "adamw", "independent", "mae")
STOCK = Protocol(iterations=800, deep_supervision=True)
LONG = Protocol(iterations=2500, deep_supervision=True)
QUICK = Protocol(iterations=200, rate=1e-3, optimizer="adamw")
ADAM = replace(QUICK, deep_supervision=True, trainer="nnUNetTrainerAdam1en3")
FACTORS = Experiment(
    "Blocks of 16 cost nothing, so it is the optimiser that makes the paper's recipe fall behind; half of the iterations cost "
    "half of the gain in area; 2 cases a step and no warm-up cost little.",
    (SCRATCH, "adamw", "adamw block 16", "adamw 400", "adamw 2 cases", "adamw no warm-up"),
    labels=(4,),
    protocol=QUICK,
)
RATES = Experiment(
    "The order of 1e-3: the default ahead in area, the paper's recipe behind scratch.",
    (SCRATCH, "independent", "paper"),
    labels=(4,),
)
WIDER = Experiment(
    "As with the small network: area ahead at 1 and 4 labels, nothing at 16, MAE half of it; the paper's recipe behind.",
    (SCRATCH, "wide independent", "wide mae", "wide paper"),
    labels=(1, 4, 16),
    protocol=QUICK,
    data="hippocampus, wide",
)
EXPERIMENTS = {
    "first": Experiment(
        "SGD loses to scratch, AdamW gains 0.1 to 0.2, independent views about as much as shared, MAE half of it.",
        MAIN,
        labels=(4,),
    ),
    "labels": Experiment(
        "The default gains in area most at 1 label and nothing at 16, and is behind at the end nowhere by more than 0.03; MAE "
        "within 0.05 of it; misaligned as good as exact shared views; the paper's recipe behind scratch at all.",
        LABELS,
        labels=(1, 4, 16),
        protocol=QUICK,
    ),
    "labels, stock": Experiment(
        "All leave the empty segmentation sooner than scratch, at any number of labels; default first, then MAE, the paper last.",
        (SCRATCH, "independent", "mae", "paper"),
        labels=(1, 4, 16),
    ),
    "misaligned, stock": Experiment("As good as exact shared views.", (SCRATCH, "adamw", "misaligned"), labels=(4,)),
    "stock": Experiment(
        "With more iterations and deep supervision all gain less; the default still above scratch.",
        (SCRATCH, "independent", "mae"),
        splits=(0, 1, 2),
        labels=(4,),
        protocol=STOCK,
    ),
    "stock, 2500": Experiment(
        "No difference at the end that could be seen; area still ahead.",
        (SCRATCH, "independent"),
        splits=(0, 1),
        labels=(4,),
        protocol=LONG,
    ),
    "quick": Experiment("Fine-tuned with AdamW: less scatter, the same order as with SGD.", MAIN, labels=(4,), protocol=QUICK),
    "encoder": Experiment(
        "With a decoder that starts anew SGD is no longer behind, AdamW a little lower than whole.",
        (SCRATCH, "sgd", "adamw", "independent"),
        labels=(4,),
        protocol=replace(QUICK, part="encoder"),
    ),
    "encoder, 250 iterations of SGD": Experiment(
        "After what AdamW fine-tuning showed: SGD's encoder is ahead of its whole network here, too.",
        (SCRATCH, "sgd", "independent"),
        labels=(4,),
        protocol=Protocol(part="encoder"),
    ),
    "objectives": Experiment(
        "C-CVA as the default; without the contrastive loss no worse; CVA alone behind both.",
        (SCRATCH, "independent", "ccva", "mae+cva", "cva alone"),
        labels=(4,),
        protocol=QUICK,
    ),
    "objectives, stock": Experiment("The same order.", (SCRATCH, "independent", "ccva", "mae+cva", "cva alone"), labels=(4,)),
    "second data": Experiment(
        "With five structures of other anatomy: area ahead, the end not; MAE alike.",
        (SCRATCH, "demo independent", "demo mae"),
        labels=(1, 4),
        protocol=QUICK,
        data="made up",
    ),
    "wide": WIDER,
    "wide, stock": replace(WIDER, expected="The order of the quick one, closer together.", protocol=STOCK),
    "rates": Experiment(
        "AdamW 3e-4 gains less, 3e-3 as much as 1e-3 or is worse by its decoder; SGD 1e-3 is behind scratch less than 1e-2.",
        (SCRATCH, "independent", "independent 3e-4", "independent 3e-3", "paper", "sgd 1e-3"),
        labels=(4,),
        protocol=QUICK,
    ),
    "demo": Experiment(
        "Pretrained is behind with deep supervision and ahead without; blocks of 16 and three times the length help.",
        (SCRATCH, "demo", "demo block 16", "demo 1200"),
        seeds=(0,),
        splits=(0, 1, 2),
        labels=(4,),
        protocol=STOCK,
        data="made up",
    ),
    "demo without deep supervision": Experiment(
        "Ahead.", (SCRATCH, "demo"), seeds=(0,), splits=(0, 1, 2), labels=(4,), protocol=Protocol(500), data="made up"
    ),
    "demo, encoder": Experiment(
        "Less behind than the whole network.",
        (SCRATCH, "demo"),
        seeds=(0,),
        splits=(0, 1, 2),
        labels=(4,),
        protocol=Protocol(500, part="encoder", deep_supervision=True),
        data="made up",
    ),
    "demo, quick": Experiment(
        "Ahead when fine-tuned with AdamW.",
        (SCRATCH, "demo", "demo block 16"),
        seeds=(0, 1),
        splits=(0, 1, 2),
        labels=(4,),
        protocol=QUICK,
        data="made up",
    ),
    "long": Experiment(
        "Three times the pretraining gains clearly, at last also at the end.",
        (SCRATCH, "independent", "independent 2400", "mae", "mae 2400"),
        seeds=(0, 1),
        labels=(4,),
        protocol=QUICK,
    ),
    "factors": FACTORS,
    "factors, stock": replace(FACTORS, protocol=Protocol()),
    "fine-tuning 3e-4": replace(RATES, protocol=replace(QUICK, rate=3e-4)),
    "fine-tuning 3e-3": replace(RATES, protocol=replace(QUICK, rate=3e-3)),
    "fine-tuning SGD 3e-3": Experiment(
        "All leave the empty segmentation later than with 1e-2; the default still sooner than scratch.",
        (SCRATCH, "independent"),
        splits=(0, 1, 2),
        labels=(4,),
        protocol=replace(STOCK, rate=3e-3),
    ),
    # nnU-Net's own trainers
    "labels, nnU-Net": Experiment(
        "The default ahead of scratch in area in at least 4 of 5 splits and at the end by 0.02 to 0.1; MAE nearly the same; the "
        "paper's recipe behind scratch at the end; misaligned as good as shared.",
        LABELS,
        labels=(1, 4, 16),
        protocol=ADAM,
    ),
    "stock, nnU-Net": Experiment(
        "Some trainings from scratch are still empty after 800 iterations, fewer pretrained ones; area ahead.",
        (SCRATCH, "independent", "mae", "adamw", "misaligned"),
        labels=(4,),
        protocol=replace(STOCK, trainer="nnUNetTrainer"),
    ),
    "objectives, nnU-Net": Experiment(
        "Nothing separates them.", (SCRATCH, "independent", "ccva", "mae+cva", "cva alone"), labels=(4,), protocol=ADAM
    ),
    "encoder, nnU-Net": Experiment(
        "The encoder of the SGD recipe ahead of its whole network, by 0.1 or more; of the default and of MAE no difference.",
        (SCRATCH, "sgd", "independent", "mae"),
        labels=(4,),
        protocol=replace(ADAM, part="encoder"),
    ),
    "second data, nnU-Net": Experiment(
        "Neither gain nor loss.", (SCRATCH, "demo independent", "demo mae"), labels=(4,), protocol=ADAM, data="made up"
    ),
}

COMPARED = (  # experiment and recipe, experiment and recipe; the pretraining seeds and numbers of labels that both have
    ("labels", "independent", "labels", "mae"),
    ("labels, stock", "independent", "labels, stock", "mae"),
    ("stock", "independent", "stock", "mae"),
    ("labels", "independent", "labels", "paper"),
    ("labels, stock", "independent", "labels, stock", "paper"),
    ("labels", "independent", "labels", "adamw"),
    ("misaligned, stock", "adamw", "labels, stock", "independent"),
    ("labels", "adamw", "labels", "misaligned"),
    ("misaligned, stock", "adamw", "misaligned, stock", "misaligned"),
    ("objectives", "independent", "objectives", "ccva"),
    ("objectives", "independent", "objectives", "mae+cva"),
    ("objectives", "independent", "objectives", "cva alone"),
    ("second data", "demo independent", "second data", "demo mae"),
    ("factors", "adamw", "factors", "adamw block 16"),
    ("factors", "adamw", "factors", "adamw 400"),
    ("factors", "adamw", "factors", "adamw 2 cases"),
    ("factors", "adamw", "factors", "adamw no warm-up"),
    ("factors", "adamw block 16", "labels", "paper"),
    ("long", "independent 2400", "long", "independent"),
    ("long", "independent 2400", "long", "mae 2400"),
    ("labels, nnU-Net", "independent", "labels, nnU-Net", "mae"),
    ("labels, nnU-Net", "independent", "labels, nnU-Net", "paper"),
    ("labels, nnU-Net", "adamw", "labels, nnU-Net", "misaligned"),
    ("stock, nnU-Net", "independent", "stock, nnU-Net", "mae"),
    ("stock, nnU-Net", "adamw", "stock, nnU-Net", "misaligned"),
    ("encoder, nnU-Net", "sgd", "labels, nnU-Net", "paper"),
    ("encoder, nnU-Net", "independent", "labels, nnU-Net", "independent"),
    ("encoder", "sgd", "quick", "sgd"),
    ("encoder", "adamw", "quick", "adamw"),
    ("encoder", "independent", "quick", "independent"),
    ("encoder, 250 iterations of SGD", "sgd", "first", "sgd"),
    ("encoder, 250 iterations of SGD", "independent", "first", "independent"),
)


def items(experiment: Experiment) -> Iterator[dict[str, Any]]:
    """What has to be done, in an order in which every prefix is balanced over the recipes."""
    how, data = asdict(experiment.protocol), {"data": experiment.data}
    for seed in experiment.seeds:
        for recipe in experiment.recipes:
            if recipe != SCRATCH:
                yield {"kind": "pretrain", **data, "recipe": recipe, "seed": seed}
                yield {"kind": "nulls", **data, "recipe": recipe, "seed": seed}
            for split in experiment.splits:
                for labels in experiment.labels:
                    arm: dict[str, Any] = {"recipe": recipe, "seed": seed, "split": split, "labels": labels}
                    own = {"seed": 0, "part": "whole"} if recipe == SCRATCH else {}
                    yield {"kind": "fine-tune", **data, **arm, **how, **own}
