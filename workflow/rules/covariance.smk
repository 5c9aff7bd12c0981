# The original model, or a compressed one, and calibration samples -> second moments of every linear
# layer's input.
# Out: covariance/{model}/{calibration}/{shard}-of-{shards}/moments, a chain of shards: each hands
#      its hidden states to the next and a killed job costs one shard;
#      covariance/{model}/{compression}/{calibration}/{shard}-of-{shards}/moments


rule covariance:
    """Run all samples through one shard of decoder blocks, one block on the device at a time."""
    input:
        **shard_before("covariance"),
        model=made("models/{model}"),
        model_files=ancient(f"{RESULTS}/models/{{model}}/model"),
        tokens=made("tokens/{model}/{calibration}"),
        tokens_file=ancient(f"{RESULTS}/tokens/{{model}}/{{calibration}}/tokens.safetensors"),
    output:
        manifest=made("covariance/{model}/{calibration}/{shard}-of-{shards}"),
        moments=directory(
            f"{RESULTS}/covariance/{{model}}/{{calibration}}/{{shard}}-of-{{shards}}/moments"
        ),
        hidden=temp(
            f"{RESULTS}/covariance/{{model}}/{{calibration}}/{{shard}}-of-{{shards}}/hidden.safetensors"
        ),
    log:
        f"{RESULTS}/logs/covariance/{{model}}/{{calibration}}/{{shard}}-of-{{shards}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/covariance/{{model}}/{{calibration}}/{{shard}}-of-{{shards}}.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: THREADS
    resources:
        gpu=1,
        device=RUNTIME["device"],
        batch_size=RUNTIME["batch_size"],
        mem_mb=sized("covariance", "mem_mb"),
        gpu_mem_mb=sized("covariance", "gpu_mem_mb"),
        runtime=sized("covariance", "runtime", least=30),
    params:
        script=script("covariance"),
        spec=spec("covariance"),
        store=kept(),
        hidden=lambda wc, input: ["--hidden", input.hidden] if input.hidden else [],
    message:
        "Second moments of {wildcards.model} on {wildcards.calibration},"
        " shard {wildcards.shard} of {wildcards.shards}"
    shell:
        "python {params.script:q} --params {params.spec:q} --model {input.model:q} --tokens {input.tokens:q}"
        " {params.hidden:q} --batch-size {resources.batch_size} --device {resources.device}"
        " {params.store:q} --out {output.manifest:q} 2>&1 | tee {log:q}"


use rule covariance as compressed_covariance with:
    input:
        **shard_before("compressed_covariance"),
        model=made("compressed/{model}/{compression}"),
        model_files=ancient(f"{RESULTS}/compressed/{{model}}/{{compression}}/model"),
        tokens=made("tokens/{model}/{calibration}"),
        tokens_file=ancient(f"{RESULTS}/tokens/{{model}}/{{calibration}}/tokens.safetensors"),
    output:
        manifest=made("covariance/{model}/{compression}/{calibration}/{shard}-of-{shards}"),
        moments=directory(
            f"{RESULTS}/covariance/{{model}}/{{compression}}/{{calibration}}/{{shard}}-of-{{shards}}/moments"
        ),
        hidden=temp(
            f"{RESULTS}/covariance/{{model}}/{{compression}}/{{calibration}}/{{shard}}-of-{{shards}}/hidden.safetensors"
        ),
    log:
        f"{RESULTS}/logs/compressed_covariance/{{model}}/{{compression}}/{{calibration}}/{{shard}}-of-{{shards}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/compressed_covariance/{{model}}/{{compression}}/{{calibration}}/{{shard}}-of-{{shards}}.tsv"
    resources:
        gpu=1,
        device=RUNTIME["device"],
        batch_size=RUNTIME["batch_size"],
        mem_mb=sized("compressed_covariance", "mem_mb"),
        gpu_mem_mb=sized("compressed_covariance", "gpu_mem_mb"),
        runtime=sized("compressed_covariance", "runtime", least=30),
    params:
        spec=spec("compressed_covariance"),
    message:
        "Second moments of {wildcards.model} {wildcards.compression} on {wildcards.calibration},"
        " shard {wildcards.shard} of {wildcards.shards}"
