"""eora: eigenspace low-rank compensation of compressed language models.

The library under eoraflow's stages, by the way that data take. It knows nothing of Snakemake and
can be used by hand:

  The config
    config          what config.yaml means: checked, and turned into the variants to judge
    stages          each stage's folder and parameters, and which results a config asks for
    shapes          what a model consists of, from its tensors' names and shapes alone
    plan            memory, disk, work and hours of each job, before it runs
    status          which results are done, missing or stale, and why
    cleaning        which results can be deleted

  Models and text
    sources         fetched from a hub, a wheel or a local path
    text            data sets, and token windows cut from them
    architectures   what differs between families: blocks, linear layers, experts
    streaming       one decoder block at a time from a safetensors folder
    tasks           lm-eval's tasks, with their data or ours
    nltk_data       what those tasks ask of NLTK, kept beside them

  Compression
    layers          which layers are compressed, and whether settings fit them
    autoround       AutoRound, also around an adapter
    oneshot         GPTQ, AWQ, SparseGPT and Wanda, by llm-compressor
    smoothing       layers that a compression made read rescaled inputs
    existing        checkpoints that somebody else compressed
    rescaling       the scales of a rounded model, solved for anew beside an adapter

  Compensation
    covariance      second moments of every decoder linear layer's input
    triangles       symmetric matrices by their lower triangles
    solver          error + second moment -> nested low-rank factors (pure tensors)
    eigen           the largest eigenpairs of a matrix, directly or iterated and certified
    decomposition   the solver on a model, layer by layer
    rounding        factors in few bits, fitted to each other
    tuning          an adapter fine-tuned beside the frozen compressed model

  Files of it
    block_files, factor_files    second moments and factors, a file a block
    adapters, packing            adapter folders: PEFT's in 16 bits, packed ones in few

  Use and judgement
    lowrank         the module that puts an adapter beside any (quantized) linear layer
    formats         how checkpoints store quantized layers, and what reads them
    loading         original, compressed and compensated models, ready to run
    evaluation      lm-eval and perplexity on any of them
    recommendation  the cheapest that is good enough, and which rank to try next
    report          the page and the table
    export          adapters as folders for a hub, and merged checkpoints

  What every stage needs
    cli, commands   parameters of the stages' scripts, and of those that look at a whole config
    result          a stage's result: restored or filled, sealed, and published whole
    manifest        what a stage made, from what, and with what
    store           finished results, kept so that an equal one is restored
    cards, memory   which GPU a job takes, and how much memory it took
    errors          mistakes that the user can mend

Importing this package imports none of them; config, stages, manifest, result and store need no
torch.
"""
