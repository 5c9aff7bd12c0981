# Original, compressed model and second moments -> factors once, then each rank's adapter, 16-bit
# (PEFT), and that in few bits or fine-tuned.
# Out: decompositions/{model}/{compression}/{adapter}/{shard}-of-{shards}/factors,
#      adapters/{model}/{compression}/{adapter}/r{rank}-{bits}bit/adapter, r{rank}-tuned/adapter


rule decompose:
    """Fit all ranks at once: the rank-r optimum is a slice of the max_rank one."""
    input:
        model=made("models/{model}"),
        model_files=ancient(f"{RESULTS}/models/{{model}}/model"),
        compressed=made("compressed/{model}/{compression}"),
        compressed_files=ancient(f"{RESULTS}/compressed/{{model}}/{{compression}}/model"),
        moments=lambda wc: made(moments_of(wc)),
        moments_files=lambda wc: ancient(f"{RESULTS}/{moments_of(wc)}/moments"),
    output:
        manifest=made("decompositions/{model}/{compression}/{adapter}/{shard}-of-{shards}"),
        factors=directory(
            f"{RESULTS}/decompositions/{{model}}/{{compression}}/{{adapter}}/{{shard}}-of-{{shards}}/factors"
        ),
    log:
        f"{RESULTS}/logs/decompose/{{model}}/{{compression}}/{{adapter}}/{{shard}}-of-{{shards}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/decompose/{{model}}/{{compression}}/{{adapter}}/{{shard}}-of-{{shards}}.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: THREADS
    resources:
        gpu=1,
        device=RUNTIME["device"],
        mem_mb=sized("decompose", "mem_mb"),
        gpu_mem_mb=sized("decompose", "gpu_mem_mb"),
        runtime=sized("decompose", "runtime", least=30),
    params:
        script=script("decompose"),
        spec=spec("decompose"),
        store=kept(),
    message:
        "Decomposing the error of {wildcards.model} {wildcards.compression} for"
        " {wildcards.adapter}, shard {wildcards.shard} of {wildcards.shards}"
    shell:
        "python {params.script:q} --params {params.spec:q} --model {input.model:q}"
        " --compressed {input.compressed:q} --moments {input.moments:q}"
        " --device {resources.device} {params.store:q} --out {output.manifest:q} 2>&1 | tee {log:q}"


rule adapter:
    """Slice one rank and save it in PEFT's LoRA format."""
    input:
        decompositions=lambda wc: [made(folder) for folder in shards_of(wc)],
        factors=lambda wc: [ancient(f"{RESULTS}/{folder}/factors") for folder in shards_of(wc)],
    output:
        manifest=made("adapters/{model}/{compression}/{adapter}/r{rank}-16bit"),
        residuals=f"{RESULTS}/adapters/{{model}}/{{compression}}/{{adapter}}/r{{rank}}-16bit/residuals.json",
        moments=f"{RESULTS}/adapters/{{model}}/{{compression}}/{{adapter}}/r{{rank}}-16bit/moments.safetensors",
        adapter=directory(
            f"{RESULTS}/adapters/{{model}}/{{compression}}/{{adapter}}/r{{rank}}-16bit/adapter"
        ),
    log:
        f"{RESULTS}/logs/adapter/{{model}}/{{compression}}/{{adapter}}/r{{rank}}-16bit.log",
    benchmark:
        f"{RESULTS}/benchmarks/adapter/{{model}}/{{compression}}/{{adapter}}/r{{rank}}-16bit.tsv"
    conda:
        "../../envs/environment.yaml"
    resources:
        mem_mb=sized("adapter", "mem_mb"),
        runtime=sized("adapter", "runtime", least=30),
    params:
        script=script("adapter"),
        spec=spec("adapter"),
        store=kept(),
    message:
        "Adapter {wildcards.adapter} of rank {wildcards.rank} for"
        " {wildcards.model} {wildcards.compression}"
    shell:
        "python {params.script:q} --params {params.spec:q} {input.decompositions:q}"
        " {params.store:q} --out {output.manifest:q} 2>&1 | tee {log:q}"


rule quantize_adapter:
    """Round one rank's adapter to a few bits, so that its product stays what it was; pack it."""
    input:
        adapter=made("adapters/{model}/{compression}/{adapter}/r{rank}-16bit"),
        adapter_files=ancient(
            f"{RESULTS}/adapters/{{model}}/{{compression}}/{{adapter}}/r{{rank}}-16bit/adapter"
        ),
        moments=ancient(
            f"{RESULTS}/adapters/{{model}}/{{compression}}/{{adapter}}/r{{rank}}-16bit/moments.safetensors"
        ),
    output:
        manifest=made("adapters/{model}/{compression}/{adapter}/r{rank}-{bits}bit"),
        adapter=directory(
            f"{RESULTS}/adapters/{{model}}/{{compression}}/{{adapter}}/r{{rank}}-{{bits}}bit/adapter"
        ),
    log:
        f"{RESULTS}/logs/quantize_adapter/{{model}}/{{compression}}/{{adapter}}/r{{rank}}-{{bits}}bit.log",
    benchmark:
        f"{RESULTS}/benchmarks/quantize_adapter/{{model}}/{{compression}}/{{adapter}}/r{{rank}}-{{bits}}bit.tsv"
    wildcard_constraints:
        bits=r"[2348]",
    conda:
        "../../envs/environment.yaml"
    resources:
        mem_mb=sized("quantize_adapter", "mem_mb"),
        runtime=sized("quantize_adapter", "runtime", least=30),
    params:
        script=script("quantize_adapter"),
        spec=spec("quantize_adapter"),
        store=kept(),
    message:
        "Rounding adapter {wildcards.adapter} of rank {wildcards.rank} for"
        " {wildcards.model} {wildcards.compression} to {wildcards.bits} bits"
    shell:
        "python {params.script:q} --params {params.spec:q} --adapter {input.adapter:q}"
        " {params.store:q} --out {output.manifest:q} 2>&1 | tee {log:q}"


rule tune_adapter:
    """Fine-tune one rank's adapter beside the frozen compressed model."""
    input:
        compressed=made("compressed/{model}/{compression}"),
        compressed_files=ancient(f"{RESULTS}/compressed/{{model}}/{{compression}}/model"),
        adapter=made("adapters/{model}/{compression}/{adapter}/r{rank}-16bit"),
        adapter_files=ancient(
            f"{RESULTS}/adapters/{{model}}/{{compression}}/{{adapter}}/r{{rank}}-16bit/adapter"
        ),
        tokens=lambda wc: made(tuned_on(wc)),
        tokens_file=lambda wc: ancient(f"{RESULTS}/{tuned_on(wc)}/tokens.safetensors"),
    output:
        manifest=made("adapters/{model}/{compression}/{adapter}/r{rank}-tuned"),
        losses=f"{RESULTS}/adapters/{{model}}/{{compression}}/{{adapter}}/r{{rank}}-tuned/losses.json",
        adapter=directory(
            f"{RESULTS}/adapters/{{model}}/{{compression}}/{{adapter}}/r{{rank}}-tuned/adapter"
        ),
    log:
        f"{RESULTS}/logs/tune_adapter/{{model}}/{{compression}}/{{adapter}}/r{{rank}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/tune_adapter/{{model}}/{{compression}}/{{adapter}}/r{{rank}}.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: THREADS
    resources:
        gpu=1,
        device=RUNTIME["device"],
        batch_size=RUNTIME["batch_size"],
        mem_mb=sized("tune_adapter", "mem_mb"),
        gpu_mem_mb=sized("tune_adapter", "gpu_mem_mb"),
        runtime=sized("tune_adapter", "runtime", least=30),
    params:
        script=script("tune_adapter"),
        spec=spec("tune_adapter"),
        store=kept(),
    message:
        "Fine-tuning adapter {wildcards.adapter} of rank {wildcards.rank} for"
        " {wildcards.model} {wildcards.compression}"
    shell:
        "python {params.script:q} --params {params.spec:q} --compressed {input.compressed:q}"
        " --adapter {input.adapter:q} --tokens {input.tokens:q} --batch-size {resources.batch_size}"
        " --device {resources.device} {params.store:q} --out {output.manifest:q} 2>&1 | tee {log:q}"
