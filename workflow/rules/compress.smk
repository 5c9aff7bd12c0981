# A model and its calibration samples -> the model in few bits, by AutoRound.
# Out: compressed/{model}/{compression}/model


rule compress:
    """Quantize every linear layer of the decoder; embeddings and head stay as they are."""
    input:
        model=made("models/{model}"),
        model_files=ancient(f"{RESULTS}/models/{{model}}/model"),
        tokens=lambda wc: made(
            f"tokens/{wc.model}/{config['compressions'][wc.compression]['calibration']}"
        ),
        tokens_file=lambda wc: ancient(
            f"{RESULTS}/tokens/{wc.model}/"
            f"{config['compressions'][wc.compression]['calibration']}/tokens.safetensors"
        ),
    output:
        manifest=made("compressed/{model}/{compression}"),
        model=directory(f"{RESULTS}/compressed/{{model}}/{{compression}}/model"),
    log:
        f"{RESULTS}/logs/compress/{{model}}/{{compression}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/compress/{{model}}/{{compression}}.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: THREADS
    resources:
        gpu=1,
        device=RUNTIME["device"],
        mem_mb=sized("compress", "mem_mb"),
        gpu_mem_mb=sized("compress", "gpu_mem_mb"),
        runtime=sized("compress", "runtime", least=30),
    params:
        script=script("compress"),
        spec=spec("compress"),
        store=kept(),
    message:
        "Compressing {wildcards.model} to {wildcards.compression}"
    shell:
        "python {params.script:q} --params {params.spec:q} --model {input.model:q} --tokens {input.tokens:q}"
        " --device {resources.device} {params.store:q} --out {output.manifest:q} 2>&1 | tee {log:q}"
