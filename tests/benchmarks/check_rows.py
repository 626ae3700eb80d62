"""How fast rows are checked, and the memory it takes: `python tests/benchmarks/check_rows.py`, ten minutes, on Linux.

Makes 100,000 rows in each of the three forms, with twelve kinds of bad rows among them, and checks each form in a
process of its own, on one core. Writes `data/results/rows.json`: rows a second, the process's private memory from the
first row to the last, and which bad rows were reported with the right reason. Then the samples of each data set are
read in a random order. `rows_a_second` counts wall time, `rows_a_second_of_its_own` the process's own time: others may
work on the machine (`load_before` is its load at the start). Of the private memory in `smaps_rollup`, `held` is
Private_Dirty, which cannot be reclaimed, and `mapped` is Private_Clean, pages of files that the system can drop.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pyarrow
import pyarrow.parquet
from PIL import Image

from minivlm.checkpoint import load_checkpoint
from minivlm.data import dataset
from minivlm.data.dataset import open_dataset, write_dataset
from minivlm.data.readers import checked_samples
from minivlm.data.samples import Example, Sample, SampleError
from minivlm.data.survey import Survey
from minivlm.runtime.files import write_json
from minivlm.runtime.paths import BASE, data_folder

FILE = "results/rows.json"
FORMS = {"json_lines": "rows.jsonl", "llava_array": "rows.json", "parquet": "rows.parquet"}
IMAGES, SIDE = 500, 64
SAMPLES = 10  # of memory, between the first row and the last
WORDS = (
    "a red car", "and", "green tree", "are in", "the park", "on", "left", "near us", "we see", "balloon", "far away",
)  # fmt: skip
SENTENCES = ("海滩上有一只白色的狗和一个红色的气球。", "夜晚的城市街道上有两辆黄色的汽车。", "一共有两样东西。")
ONE_CORE = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def turns(*texts: str) -> list[dict]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


BAD = {  # a kind of bad row -> the row, and a part of its error message
    "not JSON": ("{", "JSON"),
    "missing key": ({"image": "0.jpg"}, '"conversations"'),
    "wrong role": ({"conversations": [{"role": "robot", "content": "Hi"}, *turns("Hi", "Hi")]}, "robot"),
    "roles out of order": ({"conversations": turns("Hi", "Hi")[::-1]}, "is expected"),
    "no assistant turn": ({"conversations": turns("Hi")}, "no supervised token"),
    "empty answer": ({"conversations": turns("Hi", "")}, "an assistant turn is empty"),
    "more <image> than pictures": ({"conversations": turns("<image><image>", "Hi"), "image": "0.jpg"}, "2 <image> in"),
    "fewer <image> than pictures": ({"conversations": turns("Hi", "Hi"), "image": "0.jpg"}, "0 <image> in the text"),
    "file missing": ({"conversations": turns("<image>", "Hi"), "image": "gone.jpg"}, "gone.jpg is missing"),
    "outside the folder": ({"conversations": turns("<image>", "Hi"), "image": "../0.jpg"}, "no name inside"),
    "picture unreadable": ({"conversations": turns("<image>", "Hi"), "image": "cut.jpg"}, "cut off"),
    "too long": ({"conversations": turns("a red car " * 2000, "Hi")}, "tokens"),
}
IMPOSSIBLE = {  # where a form has no such row
    "json_lines": set(),
    "llava_array": {"not JSON"},  # of an array, this is the whole file
    "parquet": {"file missing", "outside the folder"},  # there are no files
}


def good_row(number: int) -> dict:
    """One image, two or none; one to three questions; in English or Chinese."""
    rng = random.Random(number)
    images = 0 if number % 5 == 4 else 2 if number % 7 == 3 else 1
    texts = []
    for _ in range(rng.randint(1, 3)):
        texts.append("What is in this picture?" if number % 2 else "这个图像中有什么内容？")
        texts.append(" ".join(rng.choices(WORDS, k=rng.randint(4, 30))) if number % 2 else rng.choice(SENTENCES) * 3)
    texts[0] = "<image>\n" * images + texts[0]
    row = {"conversations": turns(*texts)}
    return row | {"image": ", ".join(f"{rng.randrange(IMAGES)}.jpg" for _ in range(images))} if images else row


def planted(form: str, count: int) -> dict[int, str]:
    """Row number, counted from 1 -> its kind of bad row, evenly over the file."""
    names = [name for name in BAD if name not in IMPOSSIBLE[form]]
    return {1 + (2 * i + 1) * count // (2 * len(names)): name for i, name in enumerate(names)}


def rows(form: str, count: int) -> Iterator[dict | str]:
    """All rows of a form."""
    bad = planted(form, count)
    for number in range(1, count + 1):
        yield BAD[bad[number]][0] if number in bad else good_row(number)


def make(folder: Path, form: str, count: int) -> None:
    """Write the images and a file."""
    for number in range(IMAGES):
        Image.effect_noise((SIDE, SIDE), number % 100).convert("RGB").save(folder / f"{number}.jpg")
    (folder / "cut.jpg").write_bytes((folder / "0.jpg").read_bytes()[:-20])
    {"json_lines": make_lines, "llava_array": make_array, "parquet": make_table}[form](folder / FORMS[form], count)


def make_lines(file: Path, count: int) -> None:
    """One object a line."""
    with file.open("w", encoding="utf-8") as lines:
        for row in rows("json_lines", count):
            lines.write((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n")


def make_array(file: Path, count: int) -> None:
    """LLaVA's names."""
    speakers = {"user": "human", "assistant": "gpt", "robot": "robot"}
    with file.open("w", encoding="utf-8") as array:
        for number, row in enumerate(rows("llava_array", count)):
            if "conversations" in row:
                named = [{"from": speakers[t["role"]], "value": t["content"]} for t in row["conversations"]]
                row = row | {"conversations": named}
            array.write(("[" if number == 0 else ",\n") + json.dumps({"id": number} | row, ensure_ascii=False))
        array.write("]\n")


def make_table(file: Path, count: int) -> None:
    """The images in the table; all of it is one row group, the worst case for a reader."""
    files = {path.name: path.read_bytes() for path in file.parent.glob("*.jpg")}
    conversations, images = [], []
    for row in rows("parquet", count):
        turns = row if isinstance(row, str) else json.dumps(row["conversations"]) if "conversations" in row else None
        conversations.append(turns)
        names = row["image"].split(", ") if isinstance(row, dict) and "image" in row else []
        images.append([files[name] for name in names])
    table = pyarrow.table({"conversations": conversations, "image_bytes": images})
    pyarrow.parquet.write_table(table, file, row_group_size=count)


def private_memory() -> dict[str, float]:
    """This process's private memory in MB."""
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    kilobytes = {words[0]: int(words[1]) for words in lines}
    return {"held": kilobytes["Private_Dirty:"] / 1e3, "mapped": kilobytes["Private_Clean:"] / 1e3}


class Meter:
    """Memory at the first of so many calls and `SAMPLES` times after it, and the time of all."""

    def __init__(self, calls: int):
        self.every, self.calls, self.samples = max(1, (calls - 1) // SAMPLES), 0, []
        self.start, self.own_start = time.perf_counter(), time.process_time()

    def __call__(self, *_) -> None:
        """Another row is done."""
        if self.calls % self.every == 0:
            self.samples.append(private_memory())
        self.calls += 1

    def summary(self, count: int) -> dict:
        """Speed and memory over `count` rows."""
        seconds, own_seconds = time.perf_counter() - self.start, time.process_time() - self.own_start
        result = {"rows_a_second": round(count / seconds), "rows_a_second_of_its_own": round(count / own_seconds)}
        for kind in ("held", "mapped"):
            mb = [round(sample[kind], 1) for sample in self.samples]
            result[f"{kind}_mb"] = {"first": mb[0], "last": mb[-1], "range": round(max(mb) - min(mb), 1)}
        return result


def reported(result: Survey, form: str, count: int) -> list[str]:
    """The kinds of bad rows that were reported at their row with their reason; any other error as it is."""
    bad, kinds = planted(form, count), []
    for error in result.bad:
        where, _, reason = str(error).partition(": ")
        name = bad.get(int(where.split()[-1]))
        kinds.append(name if name and BAD[name][1] in reason else f"not planted: {error}")
    return kinds


def metered(meter: Meter, *arguments) -> Iterator[tuple[Sample, Example] | SampleError]:
    """`checked_samples`; the meter is called when the caller is done with a usable row."""
    for row in checked_samples(*arguments):
        yield row
        if not isinstance(row, SampleError):
            meter()


def check(form: str, folder: Path, count: int) -> dict:
    """Check the rows and write nothing."""
    _, processor, _ = load_checkpoint(data_folder() / BASE)
    meter, result = Meter(count - len(planted(form, count))), Survey()
    for row in metered(meter, folder / FORMS[form], processor):
        result.count(row)
    tokens = round(result.tokens / result.usable)
    return meter.summary(count) | {"bad": reported(result, form, count), "tokens_a_row": tokens}


def write_index(form: str, folder: Path, count: int, decode: bool = False) -> dict:
    """Check the rows, and every image where `decode` is set, and write them as a data set."""
    _, processor, _ = load_checkpoint(data_folder() / BASE)
    meter = Meter(count - len(planted(form, count)))
    with patch.object(dataset, "checked_samples", partial(metered, meter)):
        result = write_dataset(folder / "index", folder / FORMS[form], processor, decode=decode)
    size = (folder / "index" / dataset.ROWS).stat().st_size
    return meter.summary(count) | {"bad": reported(result, form, count), "index_mb": round(size / 1e6, 1)}


def read_back(form: str, folder: Path, count: int) -> dict:
    """Read all samples of the data set in a random order."""
    samples = open_dataset(folder / "index")
    order = random.Random(0).sample(range(len(samples)), len(samples))
    meter = Meter(len(order))
    for number in order:
        meter(samples[number])
    return meter.summary(len(order))


WORK = {"check": check, "index": write_index, "index_decoded": partial(write_index, decode=True)}
WORK |= {"read_back": read_back}


def measure(count: int) -> dict:
    """Every form and kind of work, each in a process of its own."""
    results = {}
    for form in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), form, count)
            results[form] = {"file_mb": round((Path(folder) / FORMS[form]).stat().st_size / 1e6, 1)}
            for work in WORK:
                command = [sys.executable, __file__, "--rows", str(count), "--work", work, form, folder]
                done = subprocess.run(command, env=os.environ | ONE_CORE, stdout=subprocess.PIPE, check=True, text=True)
                results[form][work] = json.loads(done.stdout)
        right = sorted(results[form]["index_decoded"]["bad"]) == sorted(set(BAD) - IMPOSSIBLE[form])
        results[form] |= {"all_bad_rows_found_and_no_other": right, "impossible": sorted(IMPOSSIBLE[form])}
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--work", nargs=3, metavar=("WORK", "FORM", "FOLDER"), help="one measurement, printed as JSON")
    options = parser.parse_args(arguments)
    if options.work is not None:
        work, form, folder = options.work
        print(json.dumps(WORK[work](form, Path(folder), options.rows)))
        return
    about = {"command": f"python tests/benchmarks/check_rows.py --rows {options.rows}", "rows": options.rows}
    about |= {"load_before": os.getloadavg()[0]}
    write_json(data_folder() / FILE, about | measure(options.rows))


if __name__ == "__main__":
    main()
