"""The network to be filled: built by nnU-Net's own code from a dataset, its plans and a trainer."""

from __future__ import annotations

import contextlib
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunetv2_cva import nnunet
from nnunetv2_cva.config import DEFAULT, CVAConfig
from nnunetv2_cva.files import read_object
from nnunetv2_cva.installation.hook import VARIABLE, recipes_folder, with_folder
from nnunetv2_cva.transfer.architectures import importable
from nnunetv2_cva.transfer.card import entry
from nnunetv2_cva.transfer.read import Source

_NO_IMAGE = re.compile(r"(?<![a-z])(no_?norm|masks?|seg(mentation)?s?|labels?|distances?)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """What decides about a network, and everything that nnU-Net needs to build it."""

    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    trainer: Any  # a class

    def __post_init__(self) -> None:
        nnunet.inheritance(self.plans, self.configuration)

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration with what it inherits."""
        return nnunet.configuration(self.plans, self.configuration)

    @property
    def view(self) -> tuple[int, ...]:
        """The extent that the network is built for."""
        return tuple(self.settings["patch_size"])

    @property
    def images(self) -> tuple[bool, ...]:
        """Which of the network's input channels show an image: not masks, not what is left as it is (noNorm), not the labels of a
        cascade's first stage, which come last, a channel each.
        """
        names = entry(self.dataset_json, "channel_names") or entry(self.dataset_json, "modality")
        schemes = self.settings.get("normalization_schemes")
        found = []
        for i, name in enumerate(names.values()):  # in their order, as nnU-Net takes them: keys need not count from 0
            left = isinstance(schemes, list) and len(schemes) > i and schemes[i] == "NoNormalization"
            found.append(not left and not _NO_IMAGE.search(str(name)))
        labels = self.plans_manager.get_label_manager(self.dataset_json).foreground_labels if self.follows else ()
        return (*found, *(False for _ in labels))

    @property
    def follows(self) -> bool:
        """Whether it is the second stage of a cascade."""
        return isinstance(self.settings.get("previous_stage"), str)

    @property
    def plans_manager(self) -> Any:
        """nnU-Net's view of the plans."""
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        return PlansManager(self.plans)

    @property
    def label(self) -> str:
        """How the target is called in tables and messages."""
        name, plans = self.plans.get("dataset_name"), self.plans.get("plans_name")
        return f"{name}, {self.configuration}, {plans}, {self.trainer.__name__}"

    def build(self, outputs: int | None = None, deep_supervision: bool | None = None) -> nn.Module:
        """The network on the CPU, initialised by nnU-Net, the same at every call.

        A pretraining trainer has the network of its ``backbone_trainer`` with as many outputs as inputs, and no deep supervision.
        Other ``outputs`` than the trainer's are those of a file.

        Raises:
            ValueError: nnU-Net refuses to build it; says why.
        """
        from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

        plans = self.plans_manager
        settings = plans.get_configuration(self.configuration)
        pretraining = getattr(self.trainer, "backbone_trainer", None)
        try:
            channels = determine_num_input_channels(plans, settings, self.dataset_json)
            if outputs is None:
                outputs = channels if pretraining else plans.get_label_manager(self.dataset_json).num_segmentation_heads
        except Exception as e:
            raise ValueError(f"nnU-Net cannot read dataset.json or the plans of {self.label}: {e!r}") from None
        deep = pretraining is None if deep_supervision is None else deep_supervision
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
            torch.manual_seed(0)
            try:
                return nnunet.build_network(pretraining or self.trainer, plans, settings, channels, outputs, deep).cpu()
            except Exception as e:
                reason = str(e) or "no reason given (a Primus needs a patch_size divisible by 8)"
                raise ValueError(
                    f"{self.trainer.__name__} cannot build its network for patch_size {list(self.view)} of "
                    f"{self.configuration} in {self.plans.get('plans_name')}: {reason}"
                ) from None


def target_of(source: Source) -> Target:
    """The network that a file was trained with, from the plans that lie in it.

    Raises:
        ValueError: the file does not say, or what it names is not to be imported.
    """
    if source.plans is None or source.configuration is None or source.dataset_json is None or source.builder is None:
        raise ValueError(f"{source.path} ({source.kind}) does not state plans, configuration, dataset and trainer.")
    target = Target(source.plans, source.configuration, source.dataset_json, trainer_class(source.builder))
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    stock = nnUNetTrainer.build_network_architecture
    if getattr(target.trainer, "backbone_trainer", target.trainer).build_network_architecture is stock:
        importable(entry(target.settings, "architecture"))
    return target


def find_target(dataset: str, configuration: str, plans: str, trainer: str) -> Target:
    """The target of this name or number as ``nnUNetv2_train`` would find it.

    Raises:
        ValueError: unknown dataset, not planned, no such configuration, unknown trainer; says what to do.
    """
    folder = nnunet.folder(nnunet.PREPROCESSED) / nnunet.find_dataset(dataset)
    number = nnunet.dataset_argument(folder.name)
    if not folder.is_dir():
        raise ValueError(f"{folder.name} is not planned. nnUNetv2_plan_and_preprocess -d {number} makes {folder}.")
    file = folder / f"{plans}.json"
    if not file.is_file():
        others = sorted(p.stem for p in folder.glob("*.json") if _holds_configurations(p))
        raise ValueError(
            f"{folder.name} has no plans {plans!r} in {folder}. Found: {', '.join(others) or 'none'}. To make them: "
            f"{_planning(number, plans)}"
        )
    if not (folder / "dataset.json").is_file():
        raise ValueError(f"{folder} has no dataset.json; nnU-Net's preprocessing copies it there.")
    content, dataset_json = read_object(file), read_object(folder / "dataset.json")
    _check_dataset_json(dataset_json, folder / "dataset.json")
    for name in ("dataset_name", "plans_name"):
        if not isinstance(content.get(name), str):
            raise ValueError(f"{file} states no {name}: it is not a plans file of nnU-Net. Plan the dataset again.")
    if isinstance(content.get("pretrain_info"), dict):
        raise ValueError(
            f"{file} was made by nnUNetv2_preprocess_like_nnssl: nnUNetv2_train_pretrained of nnU-Net's git master trains it and "
            "takes a file in the nnssl format, which `nnUNetv2_cva export` writes, too."
        )
    configurations = entry(content, "configurations")
    if configuration not in configurations:
        raise ValueError(f"{file} has no configuration {configuration!r}. Found: {', '.join(configurations) or 'none'}.")
    return Target(content, configuration, dataset_json, trainer_class(trainer))


def trainer_class(name: str) -> Any:
    """nnU-Net's look-up by name (8 to 10 s, unless it is the default trainer).

    Raises:
        ValueError: unknown trainer.
    """
    if name == "nnUNetTrainer":
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

        return nnUNetTrainer
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return recursive_find_trainer_class_by_name(name)
    except (RuntimeError, AssertionError, ImportError) as e:
        hint = f"nnU-Net failed to look for it ({e})" if isinstance(e, ImportError) else "nnU-Net knows no such class"
        raise ValueError(
            f"Unknown trainer {name!r}: {hint}. Own trainers must be in nnUNet_extTrainer (now "
            f"{os.environ.get('nnUNet_extTrainer') or 'not set'}); for ours: nnUNetv2_cva hook install"
        ) from None


def settings_of(recipe: str) -> CVAConfig:
    """The settings of a recipe, ours or the user's, found as nnU-Net finds it; ours also without the hook.

    Raises:
        ValueError: nnU-Net knows no such recipe.
    """
    if recipe == "nnUNetTrainerCVA":
        return DEFAULT
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = with_folder(before, recipes_folder())
    try:
        found: CVAConfig = trainer_class(recipe).config
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
    return found


def _holds_configurations(file: Path) -> bool:
    try:
        return "configurations" in read_object(file)
    except ValueError:
        return False


def _planning(number: str, plans: str) -> str:
    """The command that makes plans of this name: nnU-Net's ResEnc planners have plans of their own."""
    if planned := re.fullmatch(r"nnUNetResEncUNet(M|L|XL)Plans", plans):
        return f"nnUNetv2_plan_and_preprocess -d {number} -pl nnUNetPlannerResEnc{planned.group(1)}"
    if plans == "nnUNetPlans":
        return f"nnUNetv2_plan_and_preprocess -d {number}"
    return f"nnUNetv2_plan_and_preprocess -d {number} with the planner that makes plans of this name, or take others"


def _check_dataset_json(content: dict[str, Any], file: Path) -> None:
    """What nnU-Net needs of it to build a network.

    Raises:
        ValueError: labels or channels are missing. Whatever the channels' keys are, nnU-Net takes them in their order.
    """
    channels = entry(content, "channel_names") or entry(content, "modality")
    if not entry(content, "labels") or not channels:
        missing = "channel_names" if entry(content, "labels") else "labels"
        raise ValueError(f"{file} states no {missing}, which nnU-Net needs to build the network. Add them to this file.")
