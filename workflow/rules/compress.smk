# A model and its calibration samples -> the model in few bits or with few weights; or a checkpoint
# that somebody compressed, looked at and taken over; or a compressed one with new scales.
# Out: compressed/{model}/{compression}/model


rule compress:
    """Compress every linear layer of the decoder; embeddings and head stay as they are."""
    input:
        unpack(compress_inputs),
        model=made("models/{model}"),
        model_files=ancient(f"{RESULTS}/models/{{model}}/model"),
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
        # An existing checkpoint is compared on the CPU.
        gpu=lambda wc: int("calibration" in config["compressions"][wc.compression]),
        device=RUNTIME["device"],
        mem_mb=sized("compress", "mem_mb"),
        gpu_mem_mb=sized("compress", "gpu_mem_mb"),
        runtime=sized("compress", "runtime", least=30),
    params:
        script=script("compress"),
        spec=spec("compress"),
        store=kept(),
        given=lambda wc, input: options(
            input, "checkpoint", "tokens", "adapter", "compressed", "moments"
        ),
    message:
        "Compressing {wildcards.model} to {wildcards.compression}"
    shell:
        "python {params.script:q} --params {params.spec:q} --model {input.model:q} {params.given:q}"
        " --device {resources.device} {params.store:q} --out {output.manifest:q} 2>&1 | tee {log:q}"
