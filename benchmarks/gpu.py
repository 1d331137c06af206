"""Everything that a GPU has to show, in one call that can be cut off and continued.

    python benchmarks/gpu.py --minutes 9 --out FOLDER     # measure; a second call goes on where the first one stopped
    python benchmarks/gpu.py --table --out FOLDER         # tables of what has been measured so far

Items in order of value (``gpu_items.py``), each in a process of its own with a time limit of its own. After every item, whatever
came of it, the results are in FOLDER/gpu.json; what the processes print is in FOLDER/gpu.log. An item that is cut off keeps what
it has found so far, and is tried again by a later call when all others have had their turn. Needs neither data nor network.

``--device cpu`` rehearses all of it at small size.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the project lies but is not installed

from gpu_items import ITEMS, Item, run  # noqa: E402
from gpu_tables import tables  # noqa: E402

from nnunetv2_cva.files import read_json, write_json  # noqa: E402

RESULTS, LOG, PARTIAL = "gpu.json", "gpu.log", "item.json"
GRACE = 3.0  # seconds between being asked to end and being killed
SLOWER = {"cuda": 1, "cpu": 4}  # how much longer than on a GPU an item may take


def load(out: Path, device: str) -> dict[str, Any]:
    """The results so far.

    Raises:
        ValueError: they are another device's.
    """
    if not (out / RESULTS).is_file():
        return {"device": device, "items": {}}
    results = read_json(out / RESULTS)
    if results["device"] != device:
        raise ValueError(
            f"{out / RESULTS} holds results of {results['device']}, not of {device}. Give another folder with --out."
        )
    return results


def save(out: Path, results: dict[str, Any]) -> None:
    """All or nothing: the call may be cut off at any time."""
    write_json(out / RESULTS, results)


def order(results: dict[str, Any]) -> list[Item]:
    """What is left to do: what has not been tried yet, then what did not come to its end."""
    state = {name: found["state"] for name, found in results["items"].items()}
    untried = [item for item in ITEMS if item.name not in state]
    return untried + [item for item in ITEMS if state.get(item.name, "done") != "done"]


def collect(out: Path, results: dict[str, Any], state: str, error: str = "", seconds: float = 0.0) -> None:
    """Take over what the item's process has written so far."""
    partial = out / PARTIAL
    if not partial.is_file():
        return
    found = read_json(partial)
    record = {"state": state, "seconds": round(seconds, 1), "found": found["found"]}
    results["items"][found["item"]] = {**record, "error": error} if error else record
    save(out, results)
    partial.unlink()


def attempt(item: Item, known: dict[str, Any], out: Path, device: str, limit: float, log: TextIO) -> tuple[str, str, float]:
    """Run an item in a process of its own, which goes on from what is ``known``. Returns how it ended, the end of what it printed
    if badly, and seconds."""
    write_json(out / PARTIAL, {"item": item.name, "found": known})
    log.write(f"\n==== {item.name}, at most {limit:.0f} s\n")
    log.flush()
    at = log.tell()
    command = [sys.executable, __file__, "--item", item.name, "--out", str(out), "--device", device]
    began = monotonic()
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        code = process.wait(limit)
        state = "done" if code == 0 else "failed"
    except subprocess.TimeoutExpired:
        state = "cut off"
    finally:  # also when this process is told to end: nothing of the item, loader processes included, is left behind
        _end(process)
    text = "" if state == "done" else (out / LOG).read_text(errors="replace")[at:][-2000:]
    return state, text, monotonic() - began


def _end(process: subprocess.Popen) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            pass


def measure(out: Path, device: str, minutes: float, only: list[str]) -> None:
    """Item after item while there is time.

    Raises:
        ValueError: another call is at work there, or results are another device's.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = monotonic() + 60 * minutes
    with open(out / LOG, "a+", errors="replace") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another call is measuring into {out}. Wait for it, or give another folder with --out.") from None
        results = load(out, device)
        collect(out, results, "cut off", "the whole call was cut off")
        for item in order(results):
            left = end - monotonic()
            if only and item.name not in only:
                continue
            if left < item.least:
                print(f"{item.name}: not begun, {left:.0f} s are left and it needs {item.least}", flush=True)
                continue
            known = results["items"].get(item.name, {}).get("found", {})
            state, error, seconds = attempt(item, known, out, device, min(left, SLOWER[device] * item.limit), log)
            collect(out, results, state, error, seconds)
            print(f"{item.name}: {state} after {seconds:.0f} s", flush=True)


def main() -> None:
    """Measure, or print tables; with --item the part of a process that measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where results are kept")
    parser.add_argument("--minutes", type=float, default=9.0, help="no item is begun that would not fit (default: 9)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", default=[], metavar="ITEM", choices=[i.name for i in ITEMS], help="these items")
    parser.add_argument("--table", action="store_true", help="print tables of the results")
    parser.add_argument("--item", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.item:  # an item's processes are ended by the kernel: a handler that they inherit can leave a pool of them waiting
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if args.table:
            print("\n".join(tables(read_json(args.out / RESULTS))))
        elif args.item:
            run(args.item, args.device, args.out / PARTIAL)
        else:
            measure(args.out, args.device, args.minutes, args.only)
    except ValueError as e:
        sys.exit(f"Error: {e}")


if __name__ == "__main__":
    main()
