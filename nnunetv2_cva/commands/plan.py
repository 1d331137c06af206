"""``nnUNetv2_cva plan``: look at the images, and write plans for pretraining on them."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from nnunetv2_cva.commands.following import (
    CONFIGURATION,
    PLANS,
    by,
    checked_for_targets,
    say_next,
    warn_of_kept,
    write_into_targets,
)
from nnunetv2_cva.commands.gather import Images, check_own, dataset_of, gather, preprocessed_folder, read_plans
from nnunetv2_cva.commands.viewing import PAPERS_BATCH, add_configuration

if TYPE_CHECKING:
    from nnunetv2_cva.datasets.targets import FineTuned
    from nnunetv2_cva.datasets.written import Recipe

HELP = "Look at images without labels and plan a pretraining on them."


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
        images,
        "--channels",
        "files _0000, _0001 of a case: a case each (split, the default), or channels of one case (stack)",
        choices=("split", "stack"),
    )
    _list(images, "--modality", "NAME", "one per channel; CT is normalised as CT, other names by z-score (or as nnU-Net says)")
    _list(images, "--adopt", "FOLDER|D", "use data where it lies: nnssl's folders, or datasets that nnU-Net has preprocessed")
    _argument(images, "--headers-only", "with --adopt: do not read the voxels (NaN, duplicates)", action="store_true")
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
    default = os.environ.get("nnUNet_def_n_proc", "8")
    about = f"processes (default {default}, of nnUNet_def_n_proc if that is set)"
    _argument(parser, "-np", about, dest="processes", type=positive, metavar="N", default=default)


def positive(text: str) -> int:
    """For argparse: a number of things."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text!r}")
    return int(text)


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
        return _keep(args, targets)
    images = gather(args, folder, targets)
    preset, recipe = _preset(args, images, targets)
    base, intensities, write_into = _base(args, folder.name, images, targets, preset)
    plans = _plans_for(args, base, folder.name, images, intensities)
    add_configuration(args, plans, _shapes(args, plans, images), preset, recipe)
    fixed = checked_for_targets(args, plans, write_into)
    _save(args, plans, images, recipe)
    write_into_targets(args, fixed)
    say_next(args, plans, recipe, bool(images.entries), write_into, targets)
    return 0


def _keep(args: argparse.Namespace, targets: list[FineTuned]) -> int:
    """The plans that are there, for other targets."""
    from nnunetv2_cva.datasets.inventory import CASES
    from nnunetv2_cva.datasets.written import recipe_of

    folder = preprocessed_folder() / dataset_of(args.dataset)
    plans = read_plans(folder, args.plans)
    fixed = checked_for_targets(args, plans, targets)
    warn_of_kept(args, plans, folder, targets)
    write_into_targets(args, fixed)
    say_next(args, plans, recipe_of(folder, args.plans), not (folder / CASES).is_file(), targets, targets)
    return 0


def _check_combination(args: argparse.Namespace) -> None:
    if args.adopt and (args.images or args.table):
        raise ValueError("--adopt uses preprocessed data, --images and --table unprocessed: make two datasets.")
    if args.keep_plans and not args.target:
        raise ValueError("--keep-plans writes existing plans into targets: name them with --target.")
    if args.planner and (args.preset or args.target):
        raise ValueError("-pl plans from the images; with --preset or --target nothing is planned.")
    if args.hold_out is not None and (not args.target or args.keep_plans):
        raise ValueError("--hold-out leaves out images that a --target validates on: name it, and plan without --keep-plans.")


def _preset(args: argparse.Namespace, images: Images, targets: list[FineTuned]) -> tuple[dict[str, Any] | None, Recipe]:
    """The preset that was asked for; for nnssl's data, which is at its spacing, the paper's. And who trains with it."""
    from nnunetv2_cva.datasets.plan import from_preset, normalised_as, schemes_of
    from nnunetv2_cva.datasets.written import Recipe

    name = args.preset
    if name is None and images.entries and images.plans is None and not targets:
        name = "ssl3d_resencl"
    if name is None:
        return None, Recipe()
    preset = from_preset(name)
    about = preset["preset"]
    memory = f" Peak memory: {about['peak_memory']}." if "peak_memory" in about else ""
    print(f"Plans: preset {name}. {about.get('description', '')}{memory}")
    recipe = Recipe(about.get("recipe", Recipe.name), about.get("fine_tuning", Recipe.trainer))
    if images.named or set(schemes_of(images.channels)) != {"ZScoreNormalization"}:
        preset = normalised_as(preset, images.channels)
    return preset, recipe


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
    """``base`` for these images; says what is odd about that."""
    from nnunetv2_cva.datasets.describe import normalisation_warnings
    from nnunetv2_cva.datasets.plan import for_images, schemes_of

    plans = for_images(base, args.configuration, name, args.plans, len(images.channels), images.found, intensities)
    configuration = plans["configurations"][args.configuration]
    asked = schemes_of(images.channels) if images.named else ()
    for line in normalisation_warnings(configuration["normalization_schemes"], images.found, asked):
        print(line)
    spacing = configuration["spacing"]
    if images.spacing is not None and any(abs(a / b - 1) > 0.1 for a, b in zip(images.spacing, spacing)):
        print(f"WARNING: the cases were preprocessed to {by(images.spacing)} mm, these plans are for {by(spacing)} mm.")
    return plans


def _shapes(args: argparse.Namespace, plans: dict[str, Any], images: Images) -> list[tuple[int, ...]]:
    """Of the preprocessed cases."""
    from nnunetv2_cva.datasets.preprocessed import shape_after

    spacing = plans["configurations"][args.configuration]["spacing"]
    return [e.shape[1:] for e in images.entries] or [shape_after(f, plans, spacing) for f in images.found]


def _save(args: argparse.Namespace, plans: dict[str, Any], images: Images, recipe: Recipe) -> None:
    """Everything that nnU-Net looks for in the dataset's folder."""
    from nnunetv2_cva.datasets import describe
    from nnunetv2_cva.datasets.inventory import write_json
    from nnunetv2_cva.datasets.written import save_plans, save_splits
    from nnunetv2_cva.views.index import write_index

    folder = preprocessed_folder() / plans["dataset_name"]
    kept = save_plans(plans, folder, recipe)
    if kept:
        listed = ", ".join(f"{k} {'removed' if v is None else v}" for k, v in kept.items())
        print(f'Your own changes of "cva" were kept: {listed}. Delete them from {args.plans}.json to plan without them.')
    write_json(folder / "dataset.json", describe.dataset_json(folder.name, images.channels, images.found or images.entries))
    if images.found:
        write_json(folder / "dataset_fingerprint.json", describe.fingerprint(images.found))
    else:
        base = plans["configurations"][args.configuration]
        spacing = images.spacing or base["spacing"]
        write_json(folder / "dataset_fingerprint.json", describe.fingerprint_of_preprocessed(images.entries, spacing, plans))
        write_index(folder / base["data_identifier"], images.entries, images.root)
    moved = save_splits(folder, images.subjects or [(f.key, f.subject) for f in images.found])
    if moved:
        print(f"WARNING: splits_final.json had other cases than there are now. New ones were written; yours are kept in {moved}.")
    print(f"Wrote {folder / args.plans}.json, and dataset.json, dataset_fingerprint.json and splits_final.json beside it.")
