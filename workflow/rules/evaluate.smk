# A model, compressed model or adapter on it, and a task -> metrics.
# Out: evaluations/{model}/{variant}/{task}/results.json, and what each sample adds to the metrics


rule evaluate:
    """Judge one variant of a model by one task."""
    input:
        unpack(evaluation_inputs),
    output:
        manifest=made("evaluations/{model}/{variant}/{task}"),
        results=f"{RESULTS}/evaluations/{{model}}/{{variant}}/{{task}}/results.json",
        samples=f"{RESULTS}/evaluations/{{model}}/{{variant}}/{{task}}/samples.json",
    log:
        f"{RESULTS}/logs/evaluate/{{model}}/{{variant}}/{{task}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/evaluate/{{model}}/{{variant}}/{{task}}.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: THREADS
    resources:
        gpu=1,
        device=RUNTIME["device"],
        batch_size=lambda wc: config["tasks"][wc.task].get("batch_size", RUNTIME["batch_size"]),
        mem_mb=sized("evaluate", "mem_mb"),
        gpu_mem_mb=sized("evaluate", "gpu_mem_mb"),
        planned_mb=planned_mb("evaluate"),
        runtime=sized("evaluate", "runtime", least=30),
    params:
        script=script("evaluate"),
        spec=spec("evaluate"),
        store=kept(),
        options=lambda wc, input: options(input, "model", "adapter", "task", "dataset", "fewshot"),
    message:
        "Judging {wildcards.model} {wildcards.variant} by {wildcards.task}"
    shell:
        "python {params.script:q} --params {params.spec:q} {params.options:q}"
        " --batch-size {resources.batch_size} --device {resources.device}"
        " --planned-mb {resources.planned_mb}"
        " {params.store:q} --out {output.manifest:q} 2>&1 | tee {log:q}"
