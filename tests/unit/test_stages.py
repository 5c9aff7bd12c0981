"""What the stages' results depend on."""

from datasets import Dataset, DatasetDict

from conftest import ROOT
from eora import config as cfg
from eora import stages


def test_a_changed_split_of_a_saved_data_set_is_seen(tmp_path):
    """Each lies in a folder of its own, below the one that is named."""
    schema = cfg.load_schema(ROOT / "workflow/schemas/config.schema.yaml")

    def told(place: str, text: str):
        split = Dataset.from_dict({"text": [text]})
        DatasetDict({"train": split}).save_to_disk(tmp_path / place)
        settings = {
            "models": {"m": {"path": str(ROOT)}},
            "datasets": {"d": {"path": str(tmp_path / place)}},
            "tasks": {"t": {"perplexity": "d"}},
        }
        config = cfg.validate(settings, schema)
        return stages.params(config, "download_dataset", {"dataset": "d"})["source"]["files"]

    before = told("a", "one")
    assert before == told("b", "one")
    assert before != told("c", "two") and "train/data-00000-of-00001.arrow" in before
