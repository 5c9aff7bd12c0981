"""One adapter by GPTQModel's adapter.generate. Runs in GPTQModel's own environment (see peer.py).

Prints nothing of its own; OUT/seconds.txt says how long the call alone took.
"""

import argparse
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="folder of the original model")
parser.add_argument("--compressed", required=True, help="folder of its GPTQ-format 2-bit form")
parser.add_argument("--tokens", required=True, help="tokens.safetensors of the tokenize stage")
parser.add_argument("--rank", required=True, type=int)
parser.add_argument("--batch-size", default=1, type=int)
parser.add_argument("--out", required=True, type=Path, help="folder for the adapter")


def main() -> None:
    arguments = parser.parse_args()
    from gptqmodel import GPTQModel
    from gptqmodel.adapter.adapter import Lora
    from safetensors.torch import load_file

    ids = load_file(arguments.tokens)["input_ids"].tolist()
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    GPTQModel.adapter.generate(
        adapter=Lora(rank=arguments.rank, path=str(arguments.out)),
        model_id_or_path=arguments.model,
        quantized_model_id_or_path=arguments.compressed,
        calibration_dataset=[{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids],
        batch_size=arguments.batch_size,
    )
    (arguments.out / "seconds.txt").write_text(f"{time.perf_counter() - start}\n")


if __name__ == "__main__":
    main()
