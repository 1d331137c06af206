"""What the documents say can be found where they say it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nnunetv2_cva.training.metrics import METRICS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere_and_nothing_waits_to_be_filled_in(document):
    text = document.read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    assert [target for target in links if not (document.parent / target).exists()] == []
    assert re.findall(r"^[A-Z][A-Z_]{4,}$", text, re.MULTILINE) == [], "a placeholder"


def test_the_readme_has_the_table_of_metrics():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [f"| `{m.name}` | {m.meaning} | {m.better} |" for m in METRICS.values()]
    assert "\n".join(rows) in text


def test_every_benchmark_is_described():
    text = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "benchmarks").glob("*.md"))
    parts = {"subjects.py", "timing.py", "made.py", "gpu_items.py", "gpu_report.py", "gpu_steps.py", "gpu_tables.py"}
    scripts = {p.name for p in (ROOT / "benchmarks").glob("*.py")} - parts
    assert {name for name in scripts if name not in text} == set()


def test_files_that_developing_names_are_there():
    text = (ROOT / "docs" / "developing.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.(?:py|md))`", text))
    assert len(named) > 25
    assert {name for name in named if not any((ROOT / place / name).exists() for place in ("", "nnunetv2_cva", "docs"))} == {
        "utils.py"
    }


# ---- scripts


def scripts(document):
    return re.findall(r"^```bash\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if scripts(d)], ids=lambda p: p.name)
def test_bash_understands_every_script(document):
    for script in scripts(document):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), script


BATCH, UNDER_TORCHRUN = scripts(ROOT / "docs" / "cluster.md")


def run_beside_doubles(folder, script, **programs):
    """Run a script where each of ``programs`` is a script of its own, and nothing else is started. Returns code and output."""
    (folder / "nnunet" / "bin").mkdir(parents=True)
    (folder / "nnunet" / "bin" / "activate").touch()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    environment = {"HOME": str(folder), "PATH": f"{folder}{os.pathsep}{os.defpath}", "SLURM_JOB_ID": "7"}
    environment.update(SLURM_CPUS_PER_TASK="8", nnUNet_results=str(folder / "results"), NODE="0", FIRST="n1")
    done = subprocess.run(["bash", "-u", "-c", script], env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("code", [0, 2, 75, 137])
def test_the_batch_script_is_queued_again_after_a_stop_and_only_then(tmp_path, code):
    options = re.findall(r"^#SBATCH (--[a-z-]+=?)", BATCH.partition("\n\n")[0], re.MULTILINE)
    assert BATCH.startswith("#!/bin/bash\n#SBATCH ") and len(options) == BATCH.count("#SBATCH"), "SLURM reads the first lines"
    found = run_beside_doubles(tmp_path, BATCH, srun=f'echo "srun $@"; exit {code}', scontrol='echo "scontrol $@"')
    assert found[0] == code and ("scontrol requeue 7" in found[1]) == (code == 75)
    assert "--cpus-per-task=8 " in found[1] and " nnUNetv2_cva train " in found[1] and found[1].count("\n") == 1 + (code == 75)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(("said", "code"), [("Exit code 75", 1), ("something", 1), ("Exit code 75", 0)])
def test_the_script_under_torchrun_asks_the_log(tmp_path, said, code):
    run = tmp_path / "results" / "Dataset100_NAME" / "nnUNetTrainerCVA__nnUNetPlansCVA__3d_fullres_cva" / "fold_all"
    run.mkdir(parents=True)
    (run / "training_log_2026_1_1_00_00_00.txt").write_text("Exit code 75")
    os.utime(run / "training_log_2026_1_1_00_00_00.txt", (1, 1))
    torchrun = f'echo "$nnUNet_cva"; echo "{said}" > "{run}/training_log_2026_1_1_00_00_01.txt"; exit {code}'
    found = run_beside_doubles(tmp_path, UNDER_TORCHRUN, torchrun=torchrun)
    assert ("start the same command again" in found[1]) == (said == "Exit code 75" and code == 1)
    assert "stop_after_minutes" in found[1]
