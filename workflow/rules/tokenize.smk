# A model's tokenizer and data sets -> calibration samples; the gate to all work on a model.
# Out: tokens/{model}/{calibration}/tokens.safetensors


localrules:
    check_model,


rule check_model:
    """Refuse what is not supported, and ranks, groups and names that fit no layer, before any work."""
    input:
        model=made("models/{model}"),
        model_files=ancient(f"{RESULTS}/models/{{model}}/model"),
    output:
        touch(f"{RESULTS}/models/{{model}}/model.checked"),
    log:
        f"{RESULTS}/logs/check_model/{{model}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/check_model/{{model}}.tsv"
    conda:
        "../../envs/environment.yaml"
    resources:
        mem_mb=4000,
        runtime=15,
    params:
        script=script("check_model"),
        ranks=lambda wc, input: mf.canonical(cfg.asked_ranks(config, wc.model)),
        compressions=lambda wc, input: mf.canonical(cfg.choices(config, wc.model)),
        trust=lambda wc, input: trust_option(config["models"][wc.model]),
        plain=lambda wc, input: plain_option(wc.model),
    message:
        "Checking model {wildcards.model}"
    shell:
        "python {params.script:q} --name {wildcards.model:q} --model {input.model:q}"
        " --ranks {params.ranks:q} --compressions {params.compressions:q} {params.trust:q}"
        " {params.plain:q} 2>&1 | tee {log:q}"


rule tokenize:
    """Cut a data set, or a mix of several, into a model's calibration samples."""
    input:
        model=made("models/{model}"),
        model_files=ancient(f"{RESULTS}/models/{{model}}/model"),
        datasets=lambda wc: [made(folder) for folder in datasets_of(wc)],
        dataset_files=lambda wc: [ancient(f"{RESULTS}/{folder}/data") for folder in datasets_of(wc)],
        checked=ancient(f"{RESULTS}/models/{{model}}/model.checked"),
    output:
        manifest=made("tokens/{model}/{calibration}"),
        tokens=f"{RESULTS}/tokens/{{model}}/{{calibration}}/tokens.safetensors",
    log:
        f"{RESULTS}/logs/tokenize/{{model}}/{{calibration}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/tokenize/{{model}}/{{calibration}}.tsv"
    conda:
        "../../envs/environment.yaml"
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        script=script("tokenize_text"),
        spec=spec("tokenize"),
        store=kept(),
        datasets=lambda wc, input: [part for d in input.datasets for part in ("--dataset", d)],
    message:
        "Tokenizing {wildcards.calibration} for {wildcards.model}"
    shell:
        "python {params.script:q} --params {params.spec:q} --model {input.model:q}"
        " {params.datasets:q} {params.store:q} --out {output.manifest:q} 2>&1 | tee {log:q}"
