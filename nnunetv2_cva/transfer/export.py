"""Weights made for a target, from plain values to a file: what ``check`` and ``export`` do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from nnunetv2_cva.model.families import layout_of
from nnunetv2_cva.transfer.adapt import OtherFamily, Transfer, fill, match, stock_obstacle
from nnunetv2_cva.transfer.licence import chosen, reminders
from nnunetv2_cva.transfer.nnssl import adaptation_plan, filled_with_itself, own_target, write_for_nnssl
from nnunetv2_cva.transfer.plans import same_plans, write_plans
from nnunetv2_cva.transfer.publish import write_hub_folder
from nnunetv2_cva.transfer.read import Source, read
from nnunetv2_cva.transfer.table import data_warnings, table
from nnunetv2_cva.transfer.target import Target, find_target
from nnunetv2_cva.transfer.weights import check_writable
from nnunetv2_cva.transfer.write import write_for_nnunet

# A file for stock nnU-Net; plans with the network of the file; a file in the layout of nnssl; a folder to upload.
Form = Literal["nnunet", "plans", "nnssl", "hub"]


@dataclass(frozen=True)
class Weights:
    """Which weights: the file, and what is wanted of it."""

    file: str
    branch: str = "student"
    decoder: str | None = None
    trust: bool = False


@dataclass(frozen=True)
class Place:
    """Where they go, in nnU-Net's names. ``source_view``: the extent the file's network was built for, if unsaid."""

    dataset: str
    configuration: str
    plans: str
    trainer: str
    source_view: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Output:
    """What is written, and how."""

    file: str
    allow_partial: bool = False
    dry_run: bool = False
    licence: str | None = None


@dataclass(frozen=True)
class Outcome:
    """``lines``: what goes where. ``refusal``: why these weights should not go there, with what to do about it. ``obstacle``: why
    nnU-Net's own loader would refuse the file as it is. ``plan``: the adaptation plan of a file in the nnssl format."""

    lines: tuple[str, ...]
    written: bool = False
    refusal: str | None = None
    obstacle: str | None = None
    plan: dict | None = None
    configuration: str | None = None  # of written plans


def check(weights: Weights, place: Place) -> Outcome:
    """Whether and how ``weights`` fit.

    Raises:
        ValueError: anything that cannot be read, found or built.
    """
    source, _, network, transfer, lines, _ = _matched(weights, place)
    return Outcome(lines, refusal=transfer.refusal(), obstacle=stock_obstacle(source, network))


def export(form: Form, weights: Weights, place: Place | None, output: Output) -> Outcome:
    """Write the weights in one of the forms. ``place``: None for "nnssl" and "hub", which describe the pretraining itself.

    Raises:
        ValueError: anything that cannot be read, found, built or written.
    """
    if form == "hub":
        return _for_hub(weights, output)
    if form == "nnssl":
        return _for_nnssl(weights, output)
    assert place is not None
    return (_plans if form == "plans" else _for_nnunet)(weights, place, output)


def _for_nnunet(weights: Weights, place: Place, output: Output) -> Outcome:
    """Write a file for stock ``-pretrained_weights``, whole and checked; not where the outcome has a refusal.

    Raises:
        ValueError: anything that cannot be read, found, built or written.
    """
    source, target, network, transfer, lines, advice = _matched(weights, place, output)
    reason = transfer.refusal()
    if reason is not None and not output.allow_partial:
        return Outcome(lines, refusal=f"{reason}." + (f" {advice}." if advice else ""))
    if not output.dry_run:
        fill(network, transfer)
        write_for_nnunet(output.file, network, transfer, target, output.licence)
    return Outcome(lines, written=not output.dry_run)


def _for_nnssl(weights: Weights, output: Output) -> Outcome:
    """Write the network of the pretraining itself in the layout of nnssl, OpenMind and the SSL3D challenge.

    Raises:
        ValueError: anything that cannot be read, built or written; the format has no name for the network.
    """
    source = _source(weights, output)
    target = own_target(source)
    network, transfer = filled_with_itself(source, target, weights.decoder)
    reminded = (f"Warning: {line}." for line in reminders(source.card.get("licence")))
    lines = (*_header(source, "Network", target), *table(transfer), *reminded)
    plan = adaptation_plan(network, target, transfer.target.channels)
    if not output.dry_run:
        write_for_nnssl(output.file, network, transfer, target, output.licence)
    return Outcome(lines, written=not output.dry_run, plan=plan)


def _for_hub(weights: Weights, output: Output) -> Outcome:
    """Write a folder as one uploads it, with the network of the pretraining itself.

    Raises:
        ValueError: anything that cannot be read, built or written.
    """
    source = read(weights.file, weights.branch, weights.trust)
    chosen(output.licence, source.card.get("licence"), source.path)
    target = own_target(source)
    network, transfer = filled_with_itself(source, target, weights.decoder)
    left = [r.keys[0] for r in transfer.rows if r.role == "encoder" and r.action != "carried"]
    if left:
        raise ValueError(f"{source.path} does not hold the whole encoder of {target.label}: {left[0]} is missing or differs.")
    reminded = tuple(f"Warning: {line}." for line in reminders(source.card.get("licence")))
    lines = (*_header(source, "Network", target), *table(transfer), *reminded)
    if output.dry_run:
        return Outcome(lines)
    return Outcome((*lines, "", *write_hub_folder(output.file, network, transfer, target, output.licence)), written=True)


def _plans(weights: Weights, place: Place, output: Output) -> Outcome:
    """Write plans named ``output.file`` for the place, with the network of the file: beside the target's own.

    Raises:
        ValueError: anything that cannot be read, found or written; the file does not describe a U-Net.
    """
    source = read(weights.file, weights.branch, weights.trust)
    target = find_target(place.dataset, place.configuration, place.plans, place.trainer)
    configuration, lines = write_plans(source, target, output.file, output.dry_run)
    return Outcome((*_header(source, "Target", target), *lines), written=not output.dry_run, configuration=configuration)


def _source(weights: Weights, output: Output | None) -> Source:
    source = read(weights.file, weights.branch, weights.trust)
    if output is not None:
        chosen(output.licence, source.card.get("licence"), source.path)
        check_writable(output.file, source.path)  # before the target, whose trainer is looked up for 10 s
    return source


def _header(source: Source, what: str, target: Target) -> tuple[str, ...]:
    return f"Weights: {source.path} ({source.kind}, {source.layout})", f"{what + ':':8} {target.label}", ""


def _matched(
    weights: Weights, place: Place, output: Output | None = None
) -> tuple[Source, Target, nn.Module, Transfer, tuple[str, ...], str | None]:
    """Source, target, its network, the transfer, the lines about it, and what to run where the plans differ."""
    source = _source(weights, output)
    target = find_target(place.dataset, place.configuration, place.plans, place.trainer)
    network = target.build()
    try:
        transfer = match(source, network, target.view, weights.decoder, place.source_view, target.images)
    except OtherFamily as e:
        advice = same_plans(source, layout_of(network.state_dict(), source.layout.family), target)
        raise OtherFamily(f"{e} {advice}." if advice else str(e)) from None
    advice = same_plans(source, transfer.target, target)
    warnings = [*data_warnings(source.card, target.settings, target.dataset_json), *reminders(source.card.get("licence"))]
    lines = [*_header(source, "Target", target), *table(transfer), *([f"Note: {advice}."] if advice else [])]
    return source, target, network, transfer, (*lines, *(f"Warning: {w}." for w in warnings)), advice
