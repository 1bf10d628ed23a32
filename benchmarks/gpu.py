"""What a GPU computes, and how fast: the tests that need one, then training steps beside the plain equations, in one JSON file.

    make gpu
    make gpu WHEELS=wheels OUT=gpu.json     # packages that are missing, from a folder of wheels
    make gpu DEVICE=cpu                     # all of it small, on the CPU: to see that it runs

It needs a checkout and a Python with PyTorch, and no network: nothing is installed but the wheels, into a folder that is removed
afterwards. Each part runs in a process of its own with a limit of time, so that one that fails leaves the others their results. The
file is written anew after each. Status 1: a test failed, or a benchmark has no figures; 2: nothing could be run.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCHES = ["small", "base"]  # configurations
NOT_NEEDED = {"numba", "zstandard"}  # by a GPU, and by the texts that are read here
TESTS_SECONDS, BENCH_SECONDS, ENDING_SECONDS = 180, 150, 15
SMALL_STEP = (
    "--n_embd 32 --n_head 2 --n_layer 2 --mlp_internal_dim_multiplier 8 --batch_size 2 --block_size 16 --rounds 1"
)
SMALL_TESTS = "test_generate or test_a_step_in_float32 or test_a_cache"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of what is missing")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="file for the results")
    parser.add_argument("--minutes", type=float, default=8, help="all of it ends after so many (default: 8)")
    parser.add_argument("--benches", nargs="*", choices=BENCHES, default=BENCHES, help="configurations")
    parser.add_argument("--facts", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.facts:
        print(json.dumps(facts(options.device)))
        return 0
    with tempfile.TemporaryDirectory(prefix="bdh-gpu-") as folder:
        return run(options, Path(folder))


def run(options: argparse.Namespace, folder: Path) -> int:
    ends = time.monotonic() + 60 * options.minutes
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if options.wheels is not None:
        wheels = sorted(map(str, options.wheels.glob("*.whl")))
        if not wheels:
            print(f"WHEELS is {options.wheels}: must be a folder with wheels", file=sys.stderr)
            return 2
        site = folder / "site"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        if subprocess.run([*pip, "--target", str(site), *wheels], check=False).returncode:
            return 2
        paths.insert(0, str(site))
    # With it cuBLAS adds in the same order each time, which it reads when it is first used.
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, __file__, "--facts", "--device", options.device]
    asked = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if asked.returncode:
        return 2
    results: dict[str, Any] = json.loads(asked.stdout)
    print(f"device    {results['device']}")
    print(f"versions  {', '.join(f'{name} {version}' for name, version in results['versions'].items())}")
    for other in results["other_versions"]:
        print(f"not there, and tried without: {other}")
    if results["missing"]:
        print(f"missing: {', '.join(results['missing'])}; give a folder of wheels, WHEELS=DIR", file=sys.stderr)
        return 2
    if results["device"] is None:
        print(
            "There is no GPU that this PyTorch can use: nothing was run. DEVICE=cpu runs all of it small, on the CPU.",
            file=sys.stderr,
        )
        return 2
    results["tests"] = tested(options.device, folder, environment, ends)
    write(options.out, results)
    results["benches"] = []
    for name in options.benches:
        results["benches"].append(timed(name, options.device, folder, environment, ends))
        write(options.out, results)
    print(f"results   {options.out}")
    is_tested = results["tests"]["passed"] > 0 and not results["tests"]["failures"] and results["tests"]["status"] == 0
    return 0 if is_tested and all(bench["status"] == 0 for bench in results["benches"]) else 1


def facts(device: str) -> dict[str, Any]:
    """Device, versions, and what is missing, in the environment of the tests and benchmarks."""
    missing: list[str] = []
    others: list[str] = []
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    for line in [*wanted, "pytest"]:
        check(line, missing, others, set())
    found: dict[str, Any] = {"device": None, "versions": {"python": platform.python_version()}}
    for name in ("torch", "triton", "transformers", "numba", "numpy", "datasets", "pydantic"):
        try:
            found["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found["versions"][name] = "missing"
    if found["versions"]["torch"] != "missing":
        import torch

        found["versions"]["CUDA"] = str(torch.version.cuda)
        if device == "cpu":
            found["device"] = f"CPU, {os.cpu_count()} cores"
        elif torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            found["device"] = properties.name
            found["memory_bytes"] = properties.total_memory
            found["compute_capability"] = f"{properties.major}.{properties.minor}"
    return {**found, "missing": missing, "other_versions": others}


def check(line: str, missing: list[str], others: list[str], seen: set[str]) -> None:
    """Notes what a requirement, and what it itself requires, lacks; not of PyTorch, whose builds differ in that."""
    from packaging.requirements import Requirement

    wanted = Requirement(line)
    try:
        there = importlib.metadata.distribution(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        (others if wanted.name in NOT_NEEDED else missing).append(f"{wanted.name}{wanted.specifier}")
        return
    if not wanted.specifier.contains(there.version, prereleases=True):
        others.append(f"{wanted.name}{wanted.specifier}, of which {there.version} is installed")
    if wanted.name in seen or wanted.name == "torch":
        return
    seen.add(wanted.name)
    for need in there.requires or []:
        marker = Requirement(need).marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ["", *wanted.extras]):
            check(need, missing, others, seen)


def tested(device: str, folder: Path, environment: dict[str, str], ends: float) -> dict[str, Any]:
    """Runs the tests of the device; how many passed, and what the others say."""
    junit = folder / "tests.xml"
    which = ["-m", "gpu"] if device == "cuda" else ["-m", "not gpu", "-k", SMALL_TESTS]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *which,
        "-p",
        "no:cacheprovider",
        f"--junitxml={junit}",
        "tests/gpu",
    ]
    print(f"tests     {' '.join(command[1:])}", flush=True)
    found = limited(command, environment, min(TESTS_SECONDS, ends - time.monotonic()))
    cases = list(outcomes(junit)) if junit.exists() else []
    failures = {name: text for name, outcome, text in cases if outcome in ("failure", "error")}
    passed = sum(outcome == "passed" for _, outcome, _ in cases)
    skipped = sum(outcome == "skipped" for _, outcome, _ in cases)
    print(f"          {passed} passed, {len(failures)} failed, {skipped} skipped in {found['seconds']:.0f} s")
    for name in failures:
        print(f"          failed: {name}")
    if found["status"] != 0:
        print(found["output"])
    return {"passed": passed, "skipped": skipped, "failures": failures, **found}


def outcomes(junit: Path) -> Iterator[tuple[str, str, str]]:
    """Name, outcome and message of each test."""
    for case in ET.parse(junit).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        of_case = [child for child in case if child.tag in ("failure", "error", "skipped")]
        if not of_case:
            yield name, "passed", ""
        for child in of_case:
            yield name, child.tag, f"{child.get('message')}\n{child.text or ''}"


def timed(config: str, device: str, folder: Path, environment: dict[str, str], ends: float) -> dict[str, Any]:
    """``bdh bench train`` of a configuration beside the plain equations, as they are and compiled."""
    file = folder / f"{config}.json"
    command = [sys.executable, "-m", "bdh", "bench", "train", "--config", f"configs/{config}.yaml"]
    # A CPU takes a minute to compile them.
    baselines = "[naive, compiled]" if device == "cuda" else "naive"
    command += ["--device", device, "--baselines", baselines, "--json", str(file)]
    if device == "cpu":
        command += SMALL_STEP.split()
    print(f"bench     {config}.yaml", flush=True)
    found = limited(command, environment, min(BENCH_SECONDS, ends - time.monotonic()))
    figures = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    for case in (figures or {}).get("cases", []):
        for form in case.get("forms", []):
            print(f"          {form['name']}: {form['ms_per_step']:,.1f} ms/step, {form['tokens_per_s']:,.0f} tokens/s")
        for form, reason in case.get("left_out", {}).items():
            print(f"          {form}: {reason}")
    if found["status"] != 0:
        print(found["output"])
    return {"config": f"configs/{config}.yaml", **found, "figures": figures}


def limited(command: list[str], environment: dict[str, str], seconds: float) -> dict[str, Any]:
    """Runs a command for at most so long: its status, seconds, the end of what it printed, and whether it was stopped."""
    if seconds <= 0:
        return {"status": None, "seconds": 0.0, "output": "no time was left for it", "timed_out": True}
    begun, timed_out = time.monotonic(), False
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
            process.send_signal(signal.SIGINT)  # upon which pytest writes down what it knows
            try:
                process.wait(ENDING_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        told = output.read()[-4000:]
    return {
        "status": process.returncode or int(timed_out),
        "seconds": round(time.monotonic() - begun, 1),
        "output": told,
        "timed_out": timed_out,
    }


def write(path: Path, results: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    shutil.move(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
