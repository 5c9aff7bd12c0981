# All results -> summary.csv, the same as summary.json, and report.html.


localrules:
    report,


rule report:
    """One table and one page of all results."""
    input:
        judged=[f"{RESULTS}/{folder}/results.json" for folder in judged()],
        weighed=[made(folder) for folder in weighed()],
    output:
        table=report(f"{RESULTS}/summary.csv", caption="../report/summary.rst", category="Results"),
        rows=f"{RESULTS}/summary.json",
        page=report(f"{RESULTS}/report.html", caption="../report/report.rst", category="Results"),
    log:
        f"{RESULTS}/logs/report.log",
    benchmark:
        f"{RESULTS}/benchmarks/report.tsv"
    conda:
        "../../envs/environment.yaml"
    resources:
        mem_mb=2000,
        runtime=15,
    params:
        script=script("report"),
        spec=lambda wc: mf.canonical(stages.report_params(config)),
        results=lambda wc, input: RESULTS,
    message:
        "Writing the report"
    shell:
        "python {params.script:q} --params {params.spec:q} {params.results:q} 2>&1 | tee {log:q}"
