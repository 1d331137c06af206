"""``nnUNetv2_cva plan``: look at the images, and write plans for pretraining on them."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from nnunetv2_cva.commands.gather import Images, adopt, check_own, dataset_of, look_at_images, preprocessed_folder, read_plans

if TYPE_CHECKING:
    from nnunetv2_cva.config import CVAConfig
    from nnunetv2_cva.datasets.targets import FineTuned

HELP = "Look at images without labels and plan a pretraining on them."
PLANS, CONFIGURATION, RECIPE = "nnUNetPlansCVA", "3d_fullres", "nnUNetTrainerCVA"
PAPERS_BATCH = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva plan``."""
    images = parser.add_argument_group("images (default: those given before, else nnUNet_raw/DatasetXXX_Name)")
    plans = parser.add_argument_group("where the plans come from (default: nnU-Net's planner, from the images)")
    _argument(
        parser, "-d", "pretraining dataset: id, or DatasetXXX_Name for a new one", dest="dataset", metavar="D", required=True
    )
    _list(images, "--images", "FOLDER|D", "folders, searched to any depth; or datasets in nnUNet_raw, whose labels are not read")
    _argument(images, "--table", "columns path[,dataset][,subject][,modality]; splits are by subject", metavar="CSV")
    _list(images, "--exclude", "PATTERN", "leave out files like '*_seg.nii.gz'")
    _argument(
        images, "--channels", "files _0000, _0001 of a case: a case each (split, the default), or channels of one case (stack)",
        choices=("split", "stack"),
    )  # fmt: skip
    _list(images, "--modality", "NAME", "one per channel; CT is normalised as CT, anything else by z-score")
    _list(images, "--adopt", "FOLDER|D", "use data where it lies: nnssl's folders, or datasets that nnU-Net has preprocessed")
    _list(plans, "--target", "D", "datasets that will be fine-tuned; the first one's plans are used")
    _argument(plans, "--target-plans", "which plans of theirs (default nnUNetPlans)", metavar="NAME", default="nnUNetPlans")
    _argument(plans, "--preset", "shipped plans; they are written into the --target datasets, too", metavar="NAME")
    _argument(plans, "--keep-plans", "leave the plans as they are, only write them into --target", action="store_true")
    _argument(plans, "-pl", "nnU-Net's planner (default nnUNetPlannerResEncL)", dest="planner", metavar="PLANNER")
    _argument(plans, "-c", "configuration to pretrain for", dest="configuration", metavar="NAME", default=CONFIGURATION)
    _argument(parser, "-p", f"name of the plans to write (default {PLANS})", dest="plans", metavar="NAME", default=PLANS)
    _argument(parser, "--view", "voxels of a view (default: proposed)", nargs=3, type=int, metavar="N")
    _argument(parser, "--batch-size", f"cases per step (default: the paper's {PAPERS_BATCH})", type=int, metavar="N")
    _argument(parser, "--hold-out", "leave out the targets' validation images of this fold", type=int, metavar="FOLD")
    add_processes(parser)


def add_processes(parser: argparse.ArgumentParser) -> None:
    """``-np``, with nnU-Net's own default."""
    default = int(os.environ.get("nnUNet_def_n_proc", 8))
    _argument(parser, "-np", f"processes (default {default})", dest="processes", type=int, metavar="N", default=default)


def _argument(parser: Any, flag: str, help: str, **options: Any) -> None:  # noqa: A002
    parser.add_argument(flag, help=help, **options)


def _list(parser: Any, flag: str, metavar: str, help: str) -> None:  # noqa: A002
    parser.add_argument(flag, help=help, metavar=metavar, nargs="+", default=[])


def run(args: argparse.Namespace) -> int:
    """Look, plan, write, and say what to type next."""
    from nnunetv2_cva.datasets.targets import load_target

    _check_combination(args)
    folder = preprocessed_folder() / dataset_of(args.dataset)
    check_own(folder)
    targets = [load_target(t, args.target_plans) for t in args.target]
    if args.keep_plans:
        plans = read_plans(folder, args.plans)
        _write_into_targets(args, plans, targets)
        _say_next(args, plans, targets, targets, RECIPE)
        return 0
    images = adopt(args, folder) if args.adopt else look_at_images(args, folder, targets)
    preset = _preset(args, images, targets)
    base, intensities, write_into = _base(args, folder.name, images, targets, preset)
    plans = _plans_for(args, base, folder.name, images, intensities)
    _add_configuration(args, plans, images, preset)
    _save(args, plans, images)
    _write_into_targets(args, plans, write_into)
    _say_next(args, plans, write_into, targets, preset["preset"]["recipe"] if preset else RECIPE)
    return 0


def _check_combination(args: argparse.Namespace) -> None:
    if args.adopt and (args.images or args.table):
        raise ValueError("--adopt uses preprocessed data, --images and --table unprocessed: make two datasets.")
    if args.keep_plans and not args.target:
        raise ValueError("--keep-plans writes existing plans into targets: name them with --target.")
    if args.planner and (args.preset or args.target):
        raise ValueError("-pl plans from the images; with --preset or --target nothing is planned.")
    if args.hold_out is not None and (not args.target or args.adopt):
        raise ValueError("--hold-out leaves out images of --target from --images: give both.")


def _preset(args: argparse.Namespace, images: Images, targets: list[FineTuned]) -> dict[str, Any] | None:
    """The preset that was asked for; for nnssl's data, which is at its spacing, the paper's."""
    from nnunetv2_cva.datasets.plan import from_preset, normalised_as

    name = args.preset
    if name is None and images.entries and images.plans is None and not targets:
        name = "ssl3d_resencl"
    if name is None:
        return None
    preset = from_preset(name)
    about = preset["preset"]
    print(f"Plans: preset {name}. {about['description']} Peak memory: {about['peak_memory']}.")
    return normalised_as(preset, images.channels) if "CT" in images.channels else preset


def _base(
    args: argparse.Namespace, name: str, images: Images, targets: list[FineTuned], preset: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any] | None, list[FineTuned]]:
    """The plans to start from; the intensities to write into them (None: theirs); the targets that need them, too."""
    from nnunetv2_cva.datasets import describe, plan

    fingerprint = describe.fingerprint(images.found) if images.found else {}
    intensities = fingerprint.get("foreground_intensity_properties_per_channel")
    if preset is not None:
        return preset, intensities or describe.normalised_intensities(len(images.channels)), targets
    if targets:
        print(f"Plans: {args.target_plans} of {targets[0].name} (network, spacing, normalisation).")
        return targets[0].plans, None, targets[1:]
    if images.plans is not None:
        print(f"Plans: {images.plans['plans_name']} of {images.plans['dataset_name']}, which the cases were preprocessed with.")
        return images.plans, None, []
    planner = args.planner or plan.DEFAULT_PLANNER
    print(f"Plans: nnU-Net's {planner} on the fingerprint of these images ...", flush=True)
    dataset = describe.dataset_json(name, images.channels, images.found)
    return plan.from_fingerprint(name, dataset, fingerprint, images.found[0], planner), intensities, []


def _plans_for(
    args: argparse.Namespace, base: dict[str, Any], name: str, images: Images, intensities: dict[str, Any] | None
) -> dict[str, Any]:
    from nnunetv2_cva.datasets.plan import for_images

    plans = for_images(base, args.configuration, name, args.plans, len(images.channels), images.found, intensities)
    spacing = plans["configurations"][args.configuration]["spacing"]
    if images.spacing is not None and any(abs(a / b - 1) > 0.1 for a, b in zip(images.spacing, spacing)):
        print(f"WARNING: the cases were preprocessed to {_by(images.spacing)} mm, these plans are for {_by(spacing)} mm.")
    return plans


def _add_configuration(args: argparse.Namespace, plans: dict[str, Any], images: Images, preset: dict[str, Any] | None) -> None:
    """Add the configuration for pretraining and say what it is."""
    import numpy as np

    from nnunetv2_cva.config import CVAConfig
    from nnunetv2_cva.datasets import plan, proposal
    from nnunetv2_cva.datasets.preprocess import shape_after

    base = plans["configurations"][args.configuration]
    shapes = [e.shape[1:] for e in images.entries] or [shape_after(f, plans, base["spacing"]) for f in images.found]
    given = preset["configurations"].get(args.configuration + plan.SUFFIX, {}) if preset else {}
    config = CVAConfig().updated(given.get("cva", {}), "preset")
    tokens = preset is not None and "Primus" in preset["preset"]["recipe"]
    step = proposal.TOKEN if tokens else proposal.strides(base["architecture"])
    view, found = _view(args.view, given.get("patch_size"), shapes, base["patch_size"], step, config)
    block = {**proposal.method_block(view), **given.get("cva", {})}
    trained_on = len(shapes) - min(config.probe_cases, len(shapes) // 10)
    batch = args.batch_size or min(given.get("batch_size", PAPERS_BATCH), trained_on)
    name = plan.add_pretraining(plans, args.configuration, view, batch, block)
    print(
        f"{args.configuration}: spacing {_by(base['spacing'])} mm, median case {_by(np.median(shapes, axis=0))} voxels, "
        f"patch {_by(base['patch_size'])}.\n{name}: view {_by(view)}, {batch} cases per step"
        f"{f', {block}' if block else ''}. {found}"
    )
    if found.fits < proposal.ENOUGH * found.cases:
        other, better = proposal.propose_view(shapes, view, step, config)
        remedy = f"--view {_by(other).replace('x', ' ')} fits into {better.fits}." if other != tuple(view) else ""
        few = f"{found.cases - found.fits} of {found.cases} cases"
        print(f"WARNING: in {few} two views of this size overlap more than configured. {remedy}")
    memory = None if tokens else proposal.estimate_memory(base["architecture"], view, batch, len(images.channels), config)
    print(memory or "GPU memory: no estimate for this network.")


def _view(
    asked: Any, preset: Any, shapes: list[tuple[int, ...]], largest: Any, step: tuple[int, ...], config: CVAConfig
) -> tuple[tuple[int, ...], Any]:
    """The view that was asked for, is the preset's or is proposed, and how much room the cases leave for two of them."""
    from nnunetv2_cva.datasets import proposal

    if asked and any(n % s for n, s in zip(asked, step)):
        raise ValueError(f"--view {_by(asked)}: expected multiples of {_by(step)}, the network's strides.")
    given = asked or preset
    if not given:
        return proposal.propose_view(shapes, largest, step, config)
    return tuple(given), proposal.room(shapes, given, config)


def _by(numbers: Any) -> str:
    return "x".join(f"{n:.4g}" for n in numbers)


def _save(args: argparse.Namespace, plans: dict[str, Any], images: Images) -> None:
    """Everything that nnU-Net looks for in the dataset's folder."""
    from nnunetv2_cva.datasets import describe, plan
    from nnunetv2_cva.datasets.inventory import write_json
    from nnunetv2_cva.datasets.preprocess import update_splits
    from nnunetv2_cva.views.index import write_index

    folder = preprocessed_folder() / plans["dataset_name"]
    path = plan.save(plans, folder)
    write_json(folder / "dataset.json", describe.dataset_json(folder.name, images.channels, images.found or images.entries))
    if images.found:
        write_json(folder / "dataset_fingerprint.json", describe.fingerprint(images.found))
        update_splits(folder, [(f.key, f.subject) for f in images.found])
    else:
        base = plans["configurations"][args.configuration]
        spacing = images.spacing or base["spacing"]
        write_json(folder / "dataset_fingerprint.json", describe.fingerprint_of_preprocessed(images.entries, spacing, plans))
        update_splits(folder, images.subjects)
        write_index(folder / base["data_identifier"], images.entries, images.root)
    print(f"Wrote {path}, and dataset.json, dataset_fingerprint.json and splits_final.json beside it.")


def _write_into_targets(args: argparse.Namespace, plans: dict[str, Any], write_into: list[FineTuned]) -> None:
    """The fixed plans into the targets that need them."""
    from nnunetv2_cva.datasets.plan import resolved
    from nnunetv2_cva.datasets.targets import fixed_plans, write_fixed_plans

    fixed = resolved(plans, args.configuration)["spacing"]
    for target in write_into:
        path = write_fixed_plans(fixed_plans(plans, args.configuration, target, args.configuration), target)
        print(f"Wrote the same network and spacing, with {target.name}'s own normalisation, into {path}.")
        own = resolved(target.plans, args.configuration)["spacing"]
        if any(not 0.5 <= a / b <= 2 for a, b in zip(fixed, own)):
            print(f"NOTE: {target.name} by itself is planned at {_by(own)} mm, these plans at {_by(fixed)} mm.")


def _say_next(
    args: argparse.Namespace, plans: dict[str, Any], write_into: list[FineTuned], targets: list[FineTuned], recipe: str
) -> None:
    """What to type for the pretraining and for every fine-tuning after it."""
    from nnunetv2_cva.datasets.plan import SUFFIX

    name, configuration = plans["dataset_name"], args.configuration + SUFFIX
    options = "" if args.plans == PLANS else f" -p {args.plans}"
    options += "" if args.configuration == CONFIGURATION else f" -c {configuration}"
    print("Next:")
    if not args.adopt:
        print(f"  nnUNetv2_cva preprocess -d {int(name[7:10])}{options}")
    print(f"  nnUNetv2_train {int(name[7:10])} {configuration} all -tr {recipe} -p {args.plans}")
    weights = f"$nnUNet_results/{name}/{recipe}__{args.plans}__{configuration}/fold_all/checkpoint_final.pth"
    channels = len(plans["foreground_intensity_properties_per_channel"])
    for target in targets:
        chosen = args.plans if target in write_into else args.target_plans
        print(f"After that, for {target.name}:")
        if target.channels != channels:
            print(f"  It has {target.channels} channels, the pretraining {channels}: adapt the weights to it first.")
        if target in write_into:
            print(f"  nnUNetv2_preprocess -d {int(target.name[7:10])} -plans_name {chosen} -c {args.configuration}")
        train = f"nnUNetv2_train {int(target.name[7:10])} {args.configuration} 0 -p {chosen}"
        print(f"  {train} -pretrained_weights {weights}")
