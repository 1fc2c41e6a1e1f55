"""The tables of several demos side by side: `python benchmarks/demo_seeds.py runs/demo-0 runs/demo-1 runs/demo-2`.

Each folder is one of `mivpg demo --out … --seed …`. Prints Markdown: every arm's metrics as mean ± standard deviation
over the seeds, the paired differences of each seed with their intervals, and how often each trait is named right.
"""

import json
import statistics
import sys
from pathlib import Path

METRICS = ("BLEU@4", "METEOR", "ROUGE_L", "CIDEr")


def spread(values: list[float], decimals: int = 3) -> str:
    """Mean ± standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{decimals}f} ± {deviation:.{decimals}f}"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    runs = [json.loads((Path(folder) / "results.json").read_text()) for folder in sys.argv[1:]]
    seeds = [str(run["seed"]) for run in runs]
    print(f"Seeds {', '.join(seeds)}; {runs[0]['num_products']['test']} test products each.\n")

    print(row("", *METRICS))
    print(row("---", *["---:"] * len(METRICS)))
    for group in ("arms", "floors", "oracles"):
        for name in runs[0][group]:
            cells = [spread([run[group][name][metric] for run in runs]) for metric in METRICS]
            print(row(name if group == "arms" else f"{group[:-1]}: {name}", *cells))

    print(f"\n{row('difference in CIDEr', *(f'seed {seed}' for seed in seeds))}")
    print(row("---", *["---:"] * len(seeds)))
    for name in runs[0]["differences"]:
        those = [run["differences"][name] for run in runs]
        print(row(name, *(f"{d['mean']:+.2f} ({d['low']:+.2f} to {d['high']:+.2f})" for d in those)))

    print(f"\n{row('right of what only other photos show', *(f'seed {seed}' for seed in seeds))}")
    print(row("---", *["---:"] * len(seeds)))
    hidden = {name: [run["hidden"][name] for run in runs] for name in runs[0]["hidden"]}
    hidden["mivpg, photos swapped"] = [run["swapped"]["hidden"] for run in runs]
    hidden["mivpg, photos swapped: the other product's"] = [run["swapped"]["hidden_of_the_other"] for run in runs]
    for name, those in hidden.items():
        print(row(name, *(f"{d['mean']:.2f} ({d['low']:.2f} to {d['high']:.2f})" for d in those)))
    print(row("CIDEr of mivpg, photos swapped", *(f"{run['swapped']['metrics']['CIDEr']:.2f}" for run in runs)))

    arms = list(runs[0]["arms"])
    print(f"\n{row('captions that say nothing wrong', *(f'seed {seed}' for seed in seeds))}")
    print(row("---", *["---:"] * len(seeds)))
    for arm in arms:
        counts = [(run["nothing_wrong"][arm], run["examples"]) for run in runs]
        print(row(arm, *(f"{share:.2f}, {e['nothing_wrong'][arm]} of {len(e['ids'])}" for share, e in counts)))

    print(f"\n{row('trait and where it is seen', 'products', *arms, 'chance', 'oracle, main photo')}")
    print(row("---", *["---:"] * (len(arms) + 3)))
    for trait in runs[0]["traits"]:
        for where in ("main", "other"):
            those = [run["traits"][trait][where] for run in runs if where in run["traits"].get(trait, {})]
            if not those:
                continue
            cells = [f"{statistics.mean(t[arm]['right'] for t in those):.2f}" for arm in arms]
            others = [f"{statistics.mean(t[name] for t in those):.2f}" for name in ("chance", "oracle")]
            print(row(f"{trait}, {where}", str(sum(t["num_products"] for t in those)), *cells, *others))

    print(f"\n{row('seconds', *(f'seed {seed}' for seed in seeds))}")
    print(row("---", *["---:"] * len(seeds)))
    for name in runs[0]["seconds"]:
        print(row(name, *(f"{run['seconds'][name]:.0f}" for run in runs)))


if __name__ == "__main__":
    main()
