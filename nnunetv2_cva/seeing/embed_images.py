"""Features of many images: what is missing, part by part."""

from __future__ import annotations

from pathlib import Path

from nnunetv2_cva.files import read_object, write_json
from nnunetv2_cva.seeing import embedding
from nnunetv2_cva.seeing.frozen import load_frozen
from nnunetv2_cva.seeing.images import find_images
from nnunetv2_cva.seeing.requests import EmbedRequest, Progress, counting, device_of
from nnunetv2_cva.transfer.hub import located


def embed_images(request: EmbedRequest, progress: Progress) -> list[str]:
    """Compute what is missing. Returns what there is to say.

    Raises:
        ValueError: a part that does not exist, images or weights that cannot be read, features computed otherwise.
    """

    if not 0 <= request.part < request.parts:
        expected = f"a part from 0 to {request.parts - 1}" if request.parts > 0 else "`parts=1` or more"
        raise ValueError(f"`part={request.part}` `parts={request.parts}`: expected {expected}.")
    network = load_frozen(request.weights, request.branch, request.trust, device_of(request.device))
    images = find_images(request.images, network.channels)
    taps = None if request.taps is None else tuple(request.taps)
    wanted = embedding.Wanted(request.level, Path(request.output), taps, request.format, request.overlap)
    _settle(request)
    todo = embedding.missing(images[request.part :: request.parts], wanted, network)
    tick = counting(progress, "Embedding", len(todo))
    for found in todo:
        embedding.embed(found, network, wanted)
        tick()
    left = embedding.missing(images, wanted, network)
    if left:
        return [f"{len(left)} of {len(images)} images are still missing: those of the other parts."]
    if request.level == "image":
        embedding.gather(images, wanted)
        return [f"Wrote {wanted.folder / embedding.TABLE} and {embedding.VECTORS}: {len(images)} images."]
    return [f"The features of {len(images)} images are in {wanted.folder}."]


def _settle(request: EmbedRequest) -> None:
    """Make the folder and note what it holds.

    Raises:
        ValueError: it holds features that were computed otherwise.
    """

    folder = Path(request.output)
    folder.mkdir(parents=True, exist_ok=True)
    weights = located(request.weights, request.trust).resolve()
    now = {
        "weights": str(weights),
        "written": weights.stat().st_mtime,
        "branch": request.branch,
        "level": request.level,
        "taps": None if request.taps is None else list(request.taps),
        "format": request.format if request.level == "dense" else None,
        "overlap": request.overlap,
    }
    path = folder / "settings.json"
    if path.is_file():
        before = read_object(path)
        changed = [k for k in now if before.get(k) != now[k]]
        if changed:
            listing = "; ".join(f"{k}: {before.get(k)}, now {now[k]}" for k in changed)
            raise ValueError(f"{folder} holds features computed otherwise ({listing}). Choose another folder (`output`).")
    else:
        write_json(path, now)
