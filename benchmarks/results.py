"""What minllama computes and writes, kept in one file, to be compared after a refactoring.

    python benchmarks/results.py OUT.json [--only GROUP ...]
    python benchmarks/results.py --compare BEFORE.json AFTER.json [--tolerance 0]

The first form runs a fixed set of runs (`result_runs.py`) with the minllama that is importable,
through its command line and the public names of `minllama` itself, and writes what came out:
tokens, log-probabilities, scores, sha256 of trained and converted weights, metrics, predictions,
options, exit statuses. What people read (help pages, error lines, reports, model cards) is kept
apart, as wording. Times, versions and paths are masked. Results depend on the processor, the number
of threads (one here) and the versions of libraries: compare two files of one machine.

The second form prints a line for each key that differs, with the first place that does, and exits
with 1 if results differ, and with 0 if nothing does or wording alone.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from result_files import MISSING, Results


def differences(
    before: Any, after: Any, tolerance: float, place: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Each place in which two values differ by more than the tolerance, and what is there."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys([*before, *after]):
            pair = before.get(name, MISSING), after.get(name, MISSING)
            yield from differences(*pair, tolerance, f"{place}.{name}")
    elif isinstance(before, list) and isinstance(after, list):
        for i, pair in enumerate(zip_longest(before, after, fillvalue=MISSING)):
            yield from differences(*pair, tolerance, f"{place}[{i}]")
    elif is_number(before) and is_number(after):
        same = before == after or (math.isnan(before) and math.isnan(after))
        if not same and not abs(before - after) <= tolerance:
            yield place, before, after
    elif type(before) is not type(after) or before != after:
        yield place, before, after


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 90 else text[:87] + "..."


def lines_of_differences(
    before: dict[str, Any], after: dict[str, Any], tolerance: float
) -> Iterator[str]:
    """A line for each key whose values differ."""
    for key in dict.fromkeys([*before, *after]):
        pair = before.get(key, MISSING), after.get(key, MISSING)
        found = list(differences(*pair, tolerance))
        if not found:
            continue
        place, one, other = found[0]
        gaps = [abs(a - b) for _, a, b in found if is_number(a) and is_number(b)]
        more = [f"{len(found)} places"] if len(found) > 1 else []
        more += [f"numbers by up to {max(gaps):.2g}"] if gaps else []
        more_of_it = f" ({', '.join(more)})" if more else ""
        yield f"{key}: {place or 'all'}: {shown(one)} -> {shown(other)}{more_of_it}"


def compare(before: dict[str, Any], after: dict[str, Any], tolerance: float) -> int:
    """Print what differs between two files of results.

    Returns:
        The exit status: 1 where results differ.
    """
    groups = [group for group in before["about"]["groups"] if group in after["about"]["groups"]]
    for name, value in before["about"]["machine"].items():
        if value != (other := after["about"]["machine"].get(name)):
            print(f"mind that {name} differs: {value} -> {other}")
    found = {}
    for section in ("results", "wording"):
        parts = [
            {key: value for key, value in side[section].items() if key.split()[0] in groups}
            for side in (before, after)
        ]
        found[section] = list(lines_of_differences(parts[0], parts[1], tolerance))
        print(f"{section}: {len(found[section])} of {len(parts[0].keys() | parts[1])} keys differ")
        for line in found[section]:
            print(f"  {line}")
    if left_out := set(before["about"]["groups"]) ^ set(after["about"]["groups"]):
        print(f"not compared, for one of the two has not run them: {', '.join(sorted(left_out))}")
    return 1 if found["results"] else 0


def added(earlier: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """What was run now, in the place of the same groups of an earlier file."""
    groups = content["about"]["groups"]
    for section in ("results", "wording"):
        kept = {k: v for k, v in earlier[section].items() if k.split()[0] not in groups}
        content[section] = kept | content[section]
    others = [group for group in earlier["about"]["groups"] if group not in groups]
    return content | {"about": {**content["about"], "groups": others + groups}}


def run(output: Path, only: list[str]) -> int:
    """Run the set, and write what came out.

    Returns:
        The exit status: 1 where a run failed that should not.
    """
    # Libraries are imported here: comparing needs none of them.
    import result_runs
    from result_processes import machine, use_importable
    from result_training import make_inputs

    with tempfile.TemporaryDirectory() as name:
        results = Results(Path(name).resolve())
        use_importable()
        make_inputs(results)
        groups = only or list(result_runs.GROUPS)
        for group in groups:
            start = time.perf_counter()
            result_runs.GROUPS[group](results)
            seconds = time.perf_counter() - start
            print(f"{group}: {seconds:.0f} seconds", file=sys.stderr, flush=True)
    about = {"groups": groups, "machine": machine()}
    content = {"about": about, "results": results.values, "wording": results.wording}
    if only and output.exists():
        content = added(json.loads(output.read_text(encoding="utf-8")), content)
    output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(
        f"wrote {output}: {len(results.values)} results, {len(results.wording)} pieces of wording"
    )
    for line in results.failures:
        print(f"failed: {line}")
    return 1 if results.failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", nargs="?", type=Path, metavar="OUT.json")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="GROUP",
        help="some of the groups, whose results are replaced in OUT.json",
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE.json", "AFTER.json"))
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="numbers may differ by this much (default 0)"
    )
    arguments = parser.parse_args()
    if (arguments.output is None) == (arguments.compare is None):
        parser.error("give either OUT.json or --compare BEFORE.json AFTER.json")
    if arguments.compare:
        before, after = (json.loads(p.read_text(encoding="utf-8")) for p in arguments.compare)
        return compare(before, after, arguments.tolerance)
    return run(arguments.output, arguments.only)


if __name__ == "__main__":
    sys.exit(main())
