# One plain rule per stage, each a papermill call through run_stage. What a stage needs and when it is stale is asked of
# the plan (nbs/flow/12_plan.ipynb), which reads it from the stage notebooks themselves.
#   make study                                   runs it      snakemake -n           says what would run, and why
#   snakemake --executor slurm --jobs 8 ...      on a cluster (add the executor's plugin)
import os
import sys

sys.path.insert(0, workflow.basedir)
from valuecot.flow.plan import Job, Plan, companion_key, stages

PROFILE = str(config.get("profile", "tiny"))
OVERRIDES = str(config.get("overrides") or "")
STUDIES = str(config.get("study", "geometry")).split(",")
PLANS = {study: Plan(PROFILE, study, OVERRIDES) for study in STUDIES}
OUT = os.path.relpath(PLANS[STUDIES[0]].folder)
RUNS = [os.path.relpath(plan.run_file(job)) for plan in PLANS.values() for job in plan.jobs()]
CALL = f"{sys.executable} -m valuecot.flow.run {PROFILE} {{params.job}} {{params.overrides:q}} 2> {{log}}"


def job(stage, wildcards):
    levels = [getattr(wildcards, level, "all") for level in ("model", "arm", "seed")]
    return Job(wildcards.study, stage, *levels)


def made(stage):
    return f"{OUT}/{{study}}/{stage}/{{model}}/{{arm}}/{{seed}}/run.json"


def log_of(stage):
    return f"{OUT}/log/{{study}}-{stage}-{{model}}-{{arm}}-{{seed}}.log"


def needs(stage):
    return lambda w: [ancient(os.path.relpath(PLANS[w.study].run_file(j))) for j in PLANS[w.study].inputs(job(stage, w))]


def key(stage):
    part = lambda name: lambda w: PLANS[w.study].key(job(stage, w))[name]
    parts = {name: part(name) for name in ("code", "settings", "files", "inputs")}
    return {"job": lambda w: job(stage, w).path, "overrides": OVERRIDES, **parts}


wildcard_constraints:
    study="[a-z]+", model="[^/]+", arm="[^/]+", seed=r"seed\d+|all"


rule all:
    input: f"{OUT}/companion/index.html"
    default_target: True


# ---- both studies
rule base_model:
    input: needs("base_model")
    output: made("base_model")
    params: **key("base_model")
    log: log_of("base_model")
    shell: CALL


rule reward_model:
    input: needs("reward_model")
    output: made("reward_model")
    params: **key("reward_model")
    log: log_of("reward_model")
    shell: CALL


rule sft:
    input: needs("sft")
    output: made("sft")
    params: **key("sft")
    log: log_of("sft")
    shell: CALL


rule grpo:
    input: needs("grpo")
    output: made("grpo")
    params: **key("grpo")
    log: log_of("grpo")
    priority: 10  # the longest stage starts first
    shell: CALL


rule samples:
    input: needs("samples")
    output: made("samples")
    params: **key("samples")
    log: log_of("samples")
    shell: CALL


# ---- geometry
rule prompts:
    input: needs("prompts")
    output: made("prompts")
    params: **key("prompts")
    log: log_of("prompts")
    shell: CALL


rule traces:
    input: needs("traces")
    output: made("traces")
    params: **key("traces")
    log: log_of("traces")
    shell: CALL


rule spectrum:
    input: needs("spectrum")
    output: made("spectrum")
    params: **key("spectrum")
    log: log_of("spectrum")
    priority: 5
    shell: CALL


rule range:
    input: needs("range")
    output: made("range")
    params: **key("range")
    log: log_of("range")
    shell: CALL


rule landscape:
    input: needs("landscape")
    output: made("landscape")
    params: **key("landscape")
    log: log_of("landscape")
    shell: CALL


# ---- what a reader opens
rule report:
    input: needs("report")
    output: f"{OUT}/{{study}}/report/run.json"
    params: **key("report")
    log: f"{OUT}/log/{{study}}-report.log"
    shell: CALL


rule companion:
    input: [ancient(path) for path in RUNS]
    output: f"{OUT}/companion/index.html"
    params: key=companion_key(list(PLANS.values()))
    log: f"{OUT}/log/companion.log"
    shell: f"{sys.executable} -m valuecot.companion.pages {PROFILE} 2> {{log}}"
