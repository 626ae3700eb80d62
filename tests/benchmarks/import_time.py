"""What `import minivlm` costs beside the library's classes that it is made of:

    `python tests/benchmarks/import_time.py`.

Each import has a fresh process; both kinds take turns, so that whatever else the machine does falls on both alike.
Writes `data/results/import_time.json`.
"""

import argparse
import json
import statistics
import subprocess
import sys

from minivlm.runtime.paths import data_folder

OURS = "import minivlm"
THEIRS = (
    "import torch; from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, "
    "AutoProcessor, BatchFeature, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, GenerationConfig, "
    "LlamaConfig, PreTrainedTokenizerFast; from transformers.generation import GenerationMixin; "
    "from transformers.modeling_utils import PreTrainedModel; "
    "from transformers.processing_utils import ProcessorMixin"
)


def seconds(statement: str) -> float:
    """How long a fresh interpreter takes over a statement, by its own clock."""
    program = f"import time; began = time.perf_counter(); {statement}; print(time.perf_counter() - began)"
    return float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=11)
    times = parser.parse_args().times
    seconds(OURS), seconds(THEIRS)  # the first reads from the disk
    pairs = [(seconds(OURS), seconds(THEIRS)) for _ in range(times)]
    ours, theirs = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratios = sorted(one / other for one, other in pairs)
    made = {
        "command": f"python tests/benchmarks/import_time.py --times {times}",
        "minivlm_seconds": ours,
        "library_seconds": theirs,
        "ratio": statistics.median(ratios),
        "ratio_from_to": [ratios[0], ratios[-1]],
    }
    (data_folder() / "results" / "import_time.json").write_text(json.dumps(made, indent=1) + "\n", "utf-8")
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
