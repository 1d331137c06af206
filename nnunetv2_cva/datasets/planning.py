"""From images without labels to plans for pretraining on them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nnunetv2_cva.config import CVAConfig, resolve
from nnunetv2_cva.datasets import fingerprint as described
from nnunetv2_cva.datasets import nnunet_plans
from nnunetv2_cva.datasets.destination import shape_after, without_left_out
from nnunetv2_cva.datasets.findings import Finding, dwarfed
from nnunetv2_cva.datasets.gathering import Gathering, Images, sources_for
from nnunetv2_cva.datasets.inventory import CASES, REJECTED, Inventory, read_accepted, reject
from nnunetv2_cva.datasets.leakage import by_name, comparing_voxels, left_out
from nnunetv2_cva.datasets.memory_plan import StepMemory
from nnunetv2_cva.datasets.next_steps import CONFIGURATION, NO_GPU, PLANS, Steps, device, fine_tuning_steps, pretraining_steps
from nnunetv2_cva.datasets.parallel import Progress
from nnunetv2_cva.datasets.reading import MIN_AXIS
from nnunetv2_cva.datasets.targets import FineTuned, check_fixed_plans, fixed_plans, load_target, write_fixed_plans
from nnunetv2_cva.datasets.user_changes import Recipe, recipe_of, replaced, save_plans, save_splits, save_targets
from nnunetv2_cva.datasets.view_size import Asked, add_configuration
from nnunetv2_cva.files import read_object, write_json
from nnunetv2_cva.nnunet import PREPROCESSED, PRETRAINING, RAW, dataset_id, datasets, find_dataset, is_dataset_name
from nnunetv2_cva.nnunet import folder as nnunet_folder
from nnunetv2_cva.sizes import by
from nnunetv2_cva.views.index import read_index, write_index

BY_ALL_VOXELS = ("ZScoreNormalization", "RescaleTo01Normalization")


@dataclass(frozen=True)
class PlanRequest:
    """What to plan. ``dataset``: number, or full name, of the dataset for pretraining, which may be new.

    Images: ``images`` (folders, or datasets in nnUNet_raw) and ``table``, or ``adopt``; without any those of before, or the
    dataset's own. Plans: of nnU-Net's ``planner``, of a ``preset``, or of the first of ``target``, the datasets that will be
    fine-tuned; with ``keep_plans`` those that are there. ``view``, ``batch_size``: None to be chosen, so that a step fits onto
    a card of ``gpu_memory`` GB (None: the one that is here, or that nnU-Net's planner plans for). ``hold_out``: fold of the
    targets whose validation images are left out.
    """

    dataset: str
    images: tuple[str, ...] = ()
    table: str | None = None
    exclude: tuple[str, ...] = ()
    channels: Literal["split", "stack"] | None = None
    modality: tuple[str, ...] = ()
    adopt: tuple[str, ...] = ()
    anonymous: bool = False
    headers_only: bool = False
    target: tuple[str, ...] = ()
    target_plans: str = "nnUNetPlans"
    preset: str | None = None
    keep_plans: bool = False
    planner: str | None = None
    configuration: str = CONFIGURATION
    plans: str = PLANS
    view: tuple[int, ...] | None = None
    batch_size: int | None = None
    gpu_memory: float | None = None
    hold_out: int | None = None
    processes: int = 8


@dataclass(frozen=True)
class Planned:
    """What was written, what there is to say about it, line by line, and what to type next."""

    plans: dict[str, Any]
    said: tuple[str, ...]
    steps: tuple[Steps, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(line for line in self.said if line.startswith("WARNING"))


def plan(request: PlanRequest, progress: Progress, measure: StepMemory, settings_of: Callable[[str], CVAConfig]) -> Planned:
    """Look at the images, plan, and write what nnU-Net looks for into the dataset's folder. ``measure``: what a step takes;
    ``settings_of``: a recipe's own settings.

    Raises:
        ValueError: a request that cannot be met. Its fields are named in backticks, with their values: `view=32x32x30`.
    """
    _check_combination(request)
    folder = nnunet_folder(PREPROCESSED) / dataset_for(request.dataset)
    _check_own(folder)
    if request.preset is not None:
        nnunet_plans.from_preset(request.preset)  # before images are looked at for hours
    if request.planner is not None:
        nnunet_plans.planner_class(request.planner)
    targets = tuple(load_target(t, request.target_plans) for t in request.target)
    return _Planning(request, folder, targets, progress, measure, settings_of, []).run()


def dataset_for(given: str) -> str:
    """The name of a dataset that may be new.

    Raises:
        ValueError: a number that no dataset has, a name that nnU-Net does not accept, or a new name with a number that is in use.
    """
    if is_dataset_name(given):
        number = dataset_id(given)
        there = datasets()
        # nnU-Net looks for folders that begin with Dataset123, which Dataset1234_Big also does: it would find neither any more.
        clash = [n for n in there if n.startswith(f"Dataset{number:03d}") or given.startswith(f"Dataset{dataset_id(n):03d}")]
        if clash and given not in there:
            raise ValueError(
                f"`dataset={given}`: nnU-Net would confuse the id {number} with that of {', '.join(clash)}. Choose another one."
            )
        return given
    try:
        return find_dataset(given)
    except ValueError as e:
        raise ValueError(
            f"`dataset={given}`: {e} A new one needs its full name, for example `dataset=Dataset500_HeadMR`."
        ) from None


def planned(dataset: str, name: str) -> tuple[Path, dict[str, Any]]:
    """The preprocessed folder of a dataset that has been planned, and its plans ``name``.

    Raises:
        ValueError: no such dataset, or no plans of this name.
    """
    try:
        folder = nnunet_folder(PREPROCESSED) / find_dataset(dataset)
    except ValueError as e:
        raise ValueError(f"{e} Plan it first (nnUNetv2_cva plan).") from None
    return folder, read_plans(folder, name)


def read_plans(folder: Path, name: str) -> dict[str, Any]:
    """The plans of a dataset. Raises ValueError when there are none of this name."""
    path = folder / f"{name}.json"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in folder.glob("*Plans*.json"))) or "none"
        raise ValueError(
            f"{path} not found (plans there: {there}). Plan {folder.name} first (nnUNetv2_cva plan), or name its `plans`."
        )
    return read_object(path)


def _check_combination(request: PlanRequest) -> None:
    if request.adopt and (request.images or request.table):
        raise ValueError("`adopt` uses preprocessed data, `images` and `table` unprocessed: make two datasets.")
    if request.adopt and request.anonymous:
        raise ValueError("`adopt` uses data where it lies, under its names; `anonymous` would rename it.")
    if request.keep_plans and not request.target:
        raise ValueError("`keep_plans` writes existing plans into targets: name them with `target`.")
    if request.planner and (request.preset or request.target):
        raise ValueError("`planner` plans from the images; with `preset` or `target` nothing is planned.")
    if request.hold_out is not None and (not request.target or request.keep_plans):
        raise ValueError("`hold_out` leaves out images that a `target` validates on: name it, and plan without `keep_plans`.")


def _check_own(folder: Path) -> None:
    """Raise ValueError for a dataset with labels: nnU-Net's files in its folder must not be replaced by ours."""
    path = folder / "dataset.json"
    labels = Path(os.environ.get(RAW, RAW)) / folder.name / "labelsTr"
    if labels.is_dir() or (path.is_file() and read_object(path).get("description") != described.IMAGES_ONLY):
        raise ValueError(
            f"{folder.name} is a dataset with labels. Give the pretraining a dataset of its own, which may use the same images: "
            f"`dataset=DatasetXXX_Name` `images={folder.name}`."
        )


@dataclass(frozen=True)
class _Planning:
    request: PlanRequest
    folder: Path
    targets: tuple[FineTuned, ...]
    progress: Progress
    measure: StepMemory
    settings_of: Callable[[str], CVAConfig]
    said: list[str]

    @property
    def say(self) -> Callable[[str], None]:
        return self.said.append

    def run(self) -> Planned:
        if self.request.keep_plans:
            return self._keep()
        r = self.request
        options = {"exclude": r.exclude, "modality": r.modality, "channels": r.channels, "anonymous": r.anonymous}
        sources = sources_for(self.folder, r.images, r.table, r.adopt, options)
        how = (r.hold_out, r.headers_only, r.target_plans, r.configuration, r.processes, self.progress, self.say)
        images = Gathering(self.folder, self.targets, *how).gather(sources)
        preset, recipe = self._preset(images)
        base, intensities, to_write = self._base(images, preset)
        plans = self._plans_for(base, images, intensities)
        images = self._without_spoilt(images, plans)
        ours = preset["configurations"].get(r.configuration + PRETRAINING, {}) if preset else None
        asked = Asked(r.view, r.batch_size, r.gpu_memory)
        of_recipe = (recipe, self.settings_of(recipe.name))
        add_configuration(plans, r.configuration, self._shapes(plans, images), ours, *of_recipe, asked, self.measure, self.say)
        fixed = self._checked_for(to_write, plans)
        self._save(plans, images, recipe)
        return self._finished(plans, fixed)

    def _keep(self) -> Planned:
        """The plans that are there, for other targets."""
        plans = read_plans(self.folder, self.request.plans)
        fixed = self._checked_for(self.targets, plans)
        self._warn_of_kept(plans)
        return self._finished(plans, fixed)

    def _finished(self, plans: dict[str, Any], fixed: list[tuple[FineTuned, dict[str, Any]]]) -> Planned:
        self._write_into(fixed)
        r, written = self.request, {target.name for target, _ in fixed}
        theirs = {t.name: r.plans if t.name in written else r.target_plans for t in self.targets}
        save_targets(self.folder, r.plans, theirs, keep=r.keep_plans)
        where = (self.folder, r.plans, r.configuration + PRETRAINING)
        self._say_length(*where)
        return Planned(plans, tuple(self.said), (*pretraining_steps(*where), *fine_tuning_steps(*where)))

    def _say_length(self, folder: Path, plans_name: str, name: str) -> None:
        """Of the training by the plans as they are written, and where there is no GPU for it."""
        config = resolve(self.settings_of(recipe_of(folder, plans_name).name), read_plans(folder, plans_name), name, {})
        self.say(
            f"Length: {config.epochs} epochs x {config.iterations_per_epoch} iterations = "
            f"{config.epochs * config.iterations_per_epoch} steps. How long that takes here: nnUNetv2_cva bench."
        )
        if device():
            self.say(f"NOTE: {NO_GPU} The lines below do.")

    # ---- which plans

    def _preset(self, images: Images) -> tuple[dict[str, Any] | None, Recipe]:
        """The preset that was asked for; for nnssl's data, which is at its spacing, the paper's. And who trains with it."""
        name = self.request.preset
        if name is None and images.entries and images.plans is None and not self.targets:
            name = "ssl3d_resencl"
        if name is None:
            return None, Recipe()
        preset = nnunet_plans.from_preset(name)
        about = preset["preset"]
        memory = f" Peak memory: {about['peak_memory']}." if "peak_memory" in about else ""
        self.say(f"Plans: preset {name}. {about.get('description', '')}{memory}")
        recipe = Recipe(about.get("recipe", Recipe.name), about.get("fine_tuning", Recipe.trainer))
        if images.named or set(nnunet_plans.schemes_of(images.channels)) != {"ZScoreNormalization"}:
            preset = nnunet_plans.normalised_as(preset, images.channels)
        return preset, recipe

    def _base(
        self, images: Images, preset: dict[str, Any] | None
    ) -> tuple[dict[str, Any], dict[str, Any] | None, tuple[FineTuned, ...]]:
        """The plans to start from; the intensities to write into them (None: theirs); the targets that need them, too."""
        fingerprint = described.fingerprint(images.found) if images.found else {}
        intensities = fingerprint.get("foreground_intensity_properties_per_channel")
        if preset is not None:
            return preset, intensities or described.normalised_intensities(len(images.channels)), self.targets
        if self.targets:
            first = self.targets[0]
            self.say(f"Plans: {self.request.target_plans} of {first.name} (network, spacing, normalisation).")
            return first.plans, None, self.targets[1:]
        if images.plans is not None:
            of = f"{images.plans['plans_name']} of {images.plans['dataset_name']}"
            self.say(f"Plans: {of}, which the cases were preprocessed with.")
            return images.plans, None, ()
        planner = self.request.planner or nnunet_plans.DEFAULT_PLANNER
        self.say(f"Plans: nnU-Net's {planner} on the fingerprint of these images.")
        dataset = described.dataset_json(self.folder.name, images.channels, images.found)
        made = nnunet_plans.from_fingerprint(self.folder.name, dataset, fingerprint, images.found[0], planner)
        return made, intensities, ()

    def _plans_for(self, base: dict[str, Any], images: Images, intensities: dict[str, Any] | None) -> dict[str, Any]:
        """``base`` for these images; says what is odd about that."""
        r, channels = self.request, len(images.channels)
        plans = nnunet_plans.for_images(base, r.configuration, self.folder.name, r.plans, channels, images.found, intensities)
        configuration = plans["configurations"][r.configuration]
        asked = nnunet_plans.schemes_of(images.channels) if images.named else ()
        self.said.extend(described.normalisation_warnings(configuration["normalization_schemes"], images.found, asked))
        spacing = configuration["spacing"]
        if images.spacing is not None and any(abs(a / b - 1) > 0.1 for a, b in zip(images.spacing, spacing)):
            self.say(f"WARNING: the cases were preprocessed to {by(images.spacing)} mm, these plans are for {by(spacing)} mm.")
        return plans

    def _without_spoilt(self, images: Images, plans: dict[str, Any]) -> Images:
        """Without cases of which preprocessing by these plans would leave next to nothing: a training would stop at them."""
        configuration = plans["configurations"][self.request.configuration]
        spacing, schemes = configuration["spacing"], configuration["normalization_schemes"]
        reasons: dict[str, str] = {}
        for f in images.found:
            shape = shape_after(f, plans, spacing)
            if min(shape) < MIN_AXIS:
                reasons[f.key] = f"{by(shape)} voxels after resampling to {by(spacing)} mm, at least {MIN_AXIS} each expected"
            for scheme, intensities in zip(schemes, f.intensities):
                if scheme in BY_ALL_VOXELS and (reason := dwarfed(intensities)):
                    reasons[f.key] = reason
        if not reasons:
            return images
        key, reason = next(iter(reasons.items()))
        if len(reasons) == len(images.found):
            raise ValueError(f"These plans leave no case to pretrain on, for example {key}: {reason}. Choose others.")
        reject(self.folder, reasons)
        self.say(f"WARNING: {len(reasons)} cases are rejected, too ({self.folder / REJECTED}), for example {key}: {reason}.")
        kept = tuple(f for f in images.found if f.key not in reasons)
        without_left_out(self.folder, {f.key for f in kept})
        return replace(images, found=kept)

    def _shapes(self, plans: dict[str, Any], images: Images) -> list[tuple[int, ...]]:
        """Of the preprocessed cases."""
        spacing = plans["configurations"][self.request.configuration]["spacing"]
        return [e.shape[1:] for e in images.entries] or [shape_after(f, plans, spacing) for f in images.found]

    # ---- what is written

    def _save(self, plans: dict[str, Any], images: Images, recipe: Recipe) -> None:
        """Everything that nnU-Net looks for in the dataset's folder."""
        folder, name = self.folder, self.request.plans
        kept = save_plans(plans, folder, recipe)
        if kept:
            listed = ", ".join(f"{k} {'removed' if v is None else v}" for k, v in kept.items())
            self.say(f'Your own changes of "cva" were kept: {listed}. Delete them from {name}.json to plan without them.')
        dataset = described.dataset_json(folder.name, images.channels, images.found or images.entries)
        write_json(folder / "dataset.json", dataset)
        base = plans["configurations"][self.request.configuration]
        if images.found:
            fingerprint = described.fingerprint(images.found)
        else:
            spacing = images.spacing or base["spacing"]
            fingerprint = described.fingerprint_of_preprocessed(images.entries, spacing, plans)
            write_index(folder / base["data_identifier"], images.entries, images.root)
        write_json(folder / "dataset_fingerprint.json", fingerprint)
        moved = save_splits(folder, images.subjects or [(f.key, f.subject) for f in images.found])
        if moved:
            self.say(replaced(moved))
        self.say(f"Wrote {folder / name}.json, and dataset.json, dataset_fingerprint.json and splits_final.json beside it.")

    # ---- targets

    def _checked_for(self, targets: tuple[FineTuned, ...], plans: dict[str, Any]) -> list[tuple[FineTuned, dict[str, Any]]]:
        """The fixed plans for every target that needs them. Raises ValueError where one has other plans of this name."""
        name = self.request.configuration
        fixed = [(target, fixed_plans(plans, name, target, name)) for target in targets]
        for target, theirs in fixed:
            check_fixed_plans(theirs, target)
        return fixed

    def _write_into(self, fixed: list[tuple[FineTuned, dict[str, Any]]]) -> None:
        for target, plans in fixed:
            path = write_fixed_plans(plans, target)
            self.say(f"Wrote the same network and spacing, with {target.name}'s own normalisation, into {path}.")
            ours, own = (
                nnunet_plans.volume_configuration(p, self.request.configuration)["spacing"] for p in (plans, target.plans)
            )
            if any(not 0.5 <= a / b <= 2 for a, b in zip(ours, own)):
                self.say(f"NOTE: {target.name} by itself is planned at {by(own)} mm, these plans at {by(ours)} mm.")

    def _warn_of_kept(self, plans: dict[str, Any]) -> None:
        """Warn where later targets validate on images that the kept plans' dataset holds."""
        folder, r = self.folder, self.request
        if (folder / CASES).is_file():
            compare = comparing_voxels(read_accepted(folder), folder, r.processes, self.progress)
            left_out(self.targets, None, compare, self.say)
            return
        index = read_index(folder / nnunet_plans.volume_configuration(plans, r.configuration)["data_identifier"])
        if index is None:
            raise ValueError(f"{folder} holds no list of cases. Plan {folder.name} without `keep_plans` first.")
        found = [Finding(str(key), (), index.datasets[code], "", "", ()) for key, code in zip(index.keys, index.dataset_of)]
        left_out(self.targets, None, lambda target: by_name(target, Inventory(tuple(found), ())), self.say)
