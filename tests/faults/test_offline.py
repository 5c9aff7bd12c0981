"""All but the downloads in a network namespace that has the loopback interface and no other."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from conftest import DOWNLOADS, ROOT, SENTENCES, Pipeline, failures, make_model, without_network


@pytest.fixture(scope="module")
def offline():
    """The beginning of a command that has no network; skips where there can be none."""
    try:
        return without_network()
    except OSError as error:
        pytest.skip(str(error))


def test_there_is_no_network(offline):
    """Not even the hub of the tests, which is on this machine's loopback."""
    with subprocess.Popen(
        [sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        port = int(server.stdout.readline().split(" port ")[1].split()[0])
        connect = [
            sys.executable,
            "-c",
            f"import socket; socket.create_connection(('127.0.0.1', {port}))",
        ]
        assert subprocess.run(connect).returncode == 0
        assert subprocess.run([*offline, *connect], capture_output=True).returncode != 0
        server.kill()


def test_all_that_follows_the_downloads(pipeline, offline):
    """It ran so for all tests."""
    output = (pipeline.folder / "offline.log").read_text()
    ran = set(re.findall(r"^(\w+) +\d+$", output, re.MULTILINE))  # Snakemake's table of jobs
    assert ran > {"check_model", "tokenize", "compress", "covariance", "evaluate", "report"}
    assert ran.isdisjoint(DOWNLOADS)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_benchmarks(folder):
    """Rows in the columns that lm-eval's tasks read, and NLTK's punkt_tab, which knows no words."""
    lines(
        folder / "ifeval.jsonl",
        [
            {
                "key": 1,
                "prompt": "Write three words in capitals and no comma.",
                "instruction_id_list": [
                    "punctuation:no_comma",
                    "change_case:capital_word_frequency",  # needs punkt_tab
                ],
                "kwargs": [{}, {"capital_frequency": 3, "capital_relation": "at least"}],
            },
            {
                "key": 2,
                "prompt": "Write at most 9 words.",
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"relation": "less than", "num_words": 10}],
            },
        ],
    )
    lines(
        folder / "gsm8k.jsonl",
        [{"question": f"What is {i} + 1?", "answer": f"One more. #### {i + 1}"} for i in range(4)],
    )
    lines(
        folder / "arc.jsonl",
        [
            {
                "question": sentence,
                "choices": {"text": ["hill", "river"], "label": ["A", "B"]},
                "answerKey": "AB"[i % 2],
            }
            for i, sentence in enumerate(SENTENCES[:4])
        ],
    )
    lines(
        folder / "mathqa.jsonl",
        [
            {
                "Problem": f"what is {i} + 1 ?",
                "options": f"a ) {i + 1} , b ) {i} , c ) 1,000 , d ) 7.5 , e ) none of these",
                "correct": "a",
            }
            for i in range(4)
        ],
    )
    (folder / "wiki.test.raw").write_text(" \n = Title = \n" + " \n".join(SENTENCES))
    punkt = folder / "nltk/tokenizers/punkt_tab/english"
    punkt.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (punkt / name).touch()


def test_benchmarks_from_local_data(tmp_path, offline):
    """IFEval, GSM8K, ARC, MathQA and WikiText-2; IFEval takes NLTK's data from this machine."""
    make_benchmarks(tmp_path)
    model = make_model(tmp_path / "tiny", layers=1) / "config.json"
    # IFEval's answers have up to 1,280 tokens.
    model.write_text(json.dumps(json.loads(model.read_text()) | {"max_position_embeddings": 2048}))
    files = {"wikitext-2": "wiki.test.raw"} | {
        name: f"{name}.jsonl" for name in ("ifeval", "gsm8k", "arc", "mathqa")
    }
    flow = Pipeline(
        tmp_path,
        {
            "models": {"tiny": {"path": str(tmp_path / "tiny")}},
            "datasets": {name: {"path": str(tmp_path / file)} for name, file in files.items()},
            "calibrations": {"c": {"dataset": "wikitext-2", "samples": 1, "seqlen": 8}},
            "compressions": {},
            "adapters": {},
            "tasks": {
                "ifeval": {"lm_eval": "ifeval", "dataset": "ifeval"},
                "gsm8k": {
                    "lm_eval": "gsm8k",
                    "dataset": "gsm8k",
                    "fewshot_dataset": "gsm8k",
                    "limit": 2,
                    "num_fewshot": 2,
                },
                "arc": {"lm_eval": "arc_challenge", "dataset": "arc"},
                "mathqa": {"lm_eval": "mathqa", "dataset": "mathqa"},
                "wikitext-2": {"perplexity": "wikitext-2", "window": 32, "windows": 4},
            },
            "runtime": {"device": "cpu", "threads": 1},
        },
        {"NLTK_DATA": str(tmp_path / "nltk")},
    )
    done = flow.snakemake("--until", *(DOWNLOADS - {"download_checkpoint"}))
    assert done.returncode == 0, failures(done.stdout, tmp_path)
    flow.env.clear()
    shutil.rmtree(tmp_path / "nltk")
    done = flow.snakemake(before=offline)
    assert done.returncode == 0, failures(done.stdout, tmp_path)
    primary = {
        path.parent.name: json.loads(path.read_text())["primary"]
        for path in flow.results.glob("evaluations/tiny/original/*/results.json")
    }
    assert primary == {
        "ifeval": "prompt_level_strict_acc",
        "gsm8k": "exact_match,strict-match",
        "arc": "acc_norm",
        "mathqa": "acc_norm",
        "wikitext-2": "perplexity",
    }


def test_nltks_data_that_cannot_be_fetched(tmp_path, offline):
    """Told by the download stage, not by an evaluation hours later."""
    params = json.dumps({"lm_eval": "ifeval", "download": False, "version": 1})
    command = [sys.executable, ROOT / "scripts/prepare_task.py", "--params", params]
    done = subprocess.run(
        [*offline, "env", f"HOME={tmp_path}", *command, "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "Error: tasks.<name>.lm_eval: this task needs NLTK's punkt_tab" in done.stderr
    assert "name it in the environment variable NLTK_DATA" in done.stderr
    assert not (tmp_path / "out/manifest.json").exists()
