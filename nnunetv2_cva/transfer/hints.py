"""What to run where weights do not fit because the plans differ."""

from __future__ import annotations

from nnunetv2_cva.nnunet import PRETRAINING
from nnunetv2_cva.transfer.adapt import Transfer
from nnunetv2_cva.transfer.card import configuration_of, entry
from nnunetv2_cva.transfer.parts import differences
from nnunetv2_cva.transfer.target import Target, number_of


def same_plans(transfer: Transfer, target: Target) -> str | None:
    """How the target gets the network that the weights were made with, where two U-Nets differ; None where nothing can be said.

    The target's own plans, and what was preprocessed with them, are never overwritten.
    """
    card = transfer.source.card
    plans, dataset = entry(card, "plans"), entry(card, "dataset").get("name")
    trained = card.get("configuration")
    base = str(trained).removesuffix(PRETRAINING)
    base = base if base in entry(plans, "configurations") else str(trained)
    try:
        moving = "architecture" in configuration_of(plans, base) and isinstance(dataset, str)
    except ValueError:
        moving = False
    if not moving or not any("stage" in d for d in differences(transfer.source.layout, transfer.target)):
        return None
    name, source_plans = str(target.plans["dataset_name"]), plans.get("plans_name")
    if dataset == name:
        return f"The weights were made with plans {source_plans}, configuration {base}, of the same dataset, as they were then"
    schemes = configuration_of(plans, base).get("normalization_schemes") or []
    if base != trained and source_plans != target.plans["plans_name"] and base in target.plans["configurations"]:
        given = str(source_plans)
        command = f"nnUNetv2_cva plan -d {dataset} --keep-plans -p {given} -c {base} --target {name}"
        command += f" --target-plans {target.plans['plans_name']}"
    elif len(schemes) != transfer.target.channels:
        return (
            f"The plans differ. Those of {dataset} cannot be moved to {name} as they are: they normalise {len(schemes)} "
            f"channel{'s' * (len(schemes) != 1)}, {name} has {transfer.target.channels}"
        )
    else:
        given = f"{source_plans}From{dataset}"
        command = f"nnUNetv2_move_plans_between_datasets -s {dataset} -sp {source_plans} -t {name} -tp {given}"
    return (
        f"The plans differ. To give {name} those of {dataset}, beside its own: {command} && nnUNetv2_preprocess -d "
        f"{number_of(name)} -plans_name {given} -c {base}; then use -p {given} -c {base}"
    )
