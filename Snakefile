# One plain rule per stage, each a papermill call through run_stage. What a stage needs and when it is stale is asked of
# the plan (nbs/flow/12_plan.ipynb), which reads it from the stage notebooks themselves.
#   make study                                   runs it      snakemake -n           says what would run, and why
#   snakemake --executor slurm --jobs 8 ...      on a cluster (add the executor's plugin)
import os
import shlex
import sys
import threading
from pathlib import Path

from snakemake.scheduling.job_scheduler import JobScheduler

sys.path.insert(0, workflow.basedir)
from valuecot.flow.plan import Job, Plan, companion_key, companion_stale, key_file, mark, put_in_order, why

# Snakemake 9 looks for runs again a second after each look and after each run that ends, so that after n runs it looks n times
# a second (github.com/snakemake/snakemake/pull/3744): for 300 runs that took 14 minutes of a core. One look a second is enough.
def look_once(scheduler, delay):
    def look():
        scheduler.look_is_due = False
        scheduler._open_jobs.release()

    if not getattr(scheduler, "look_is_due", False):
        scheduler.look_is_due = True
        threading.Timer(delay, look).start()


JobScheduler._schedule_reevalutation = look_once

PROFILE = str(config.get("profile", "tiny"))
OVERRIDES = str(config.get("overrides") or "")
STUDIES = str(config.get("study", "geometry")).split(",")
PLANS = {study: Plan(PROFILE, study, OVERRIDES) for study in STUDIES}
CARDS = 0 if PROFILE in ("tiny", "test") else 1  # GPUs of a stage, for an executor that hands them out
TRAINED_ON = CARDS * PLANS[STUDIES[0]].settings["machine"].processes
OUT = os.path.relpath(PLANS[STUDIES[0]].folder)
RUNS = [os.path.relpath(plan.run_file(job)) for plan in PLANS.values() for job in plan.jobs()]
CALL = f"{sys.executable} -m valuecot.flow.run {PROFILE} {{params.job}} {shlex.quote(OVERRIDES)} 2> {{log}}"


def job(stage, wildcards):
    levels = [getattr(wildcards, level, "all") for level in ("model", "arm", "seed")]  # model: with its data set
    return Job.read("/".join([wildcards.study, stage, *levels]))


def made(stage):
    return f"{OUT}/{{study}}/{stage}/{{model}}/{{arm}}/{{seed}}/run.json"


def log_of(stage):
    return f"{OUT}/log/{{study}}-{stage}-{{model}}-{{arm}}-{{seed}}.log"


def needs(stage):
    def inputs(w):
        plan, this = PLANS[w.study], job(stage, w)
        return [*[os.path.relpath(plan.run_file(j)) for j in plan.inputs(this)], os.path.relpath(key_file(plan, this))]

    return inputs


def path_of(stage):
    return lambda w: job(stage, w).path


# A run is stale when the key in its run.json is not the one that it has now: never because a file is newer, nor for want
# of Snakemake's own records. Each product has a key file, dated after it exactly when it is stale; the products themselves
# are dated in the order of the plan.
INDEX = f"{OUT}/companion/index.html"
put_in_order(list(PLANS.values()), Path(INDEX))
for plan in PLANS.values():
    for j in plan.jobs():
        key_file(plan, j)
        if plan.run_file(j).exists() and why(plan, j):
            print(f"stale: {j.label}: {why(plan, j)}", file=sys.stderr)
COMPANION_KEY = os.path.relpath(mark(PLANS[STUDIES[0]].folder / ".keys" / "companion", Path(INDEX), companion_key(list(PLANS.values())), "companion changed" if companion_stale(list(PLANS.values())) else ""))


wildcard_constraints:
    study="[a-z]+", model="[^/]+", arm="[^/]+", seed=r"seed\d+|all"


rule all:
    input: f"{OUT}/companion/index.html"
    default_target: True


# ---- both studies
rule base_model:
    input: needs("base_model")
    output: made("base_model")
    params: job=path_of("base_model")
    log: log_of("base_model")
    resources: gpu=CARDS
    shell: CALL


rule reward_model:
    input: needs("reward_model")
    output: made("reward_model")
    params: job=path_of("reward_model")
    log: log_of("reward_model")
    resources: gpu=CARDS
    shell: CALL


rule sft:
    input: needs("sft")
    output: made("sft")
    params: job=path_of("sft")
    log: log_of("sft")
    resources: gpu=TRAINED_ON
    shell: CALL


rule grpo:
    input: needs("grpo")
    output: made("grpo")
    params: job=path_of("grpo")
    log: log_of("grpo")
    resources: gpu=TRAINED_ON
    priority: 10  # the longest stage starts first
    shell: CALL


rule samples:
    input: needs("samples")
    output: made("samples")
    params: job=path_of("samples")
    log: log_of("samples")
    resources: gpu=CARDS
    shell: CALL


# ---- geometry
rule prompts:
    input: needs("prompts")
    output: made("prompts")
    params: job=path_of("prompts")
    log: log_of("prompts")
    shell: CALL


rule traces:
    input: needs("traces")
    output: made("traces")
    params: job=path_of("traces")
    log: log_of("traces")
    shell: CALL


rule audit:
    input: needs("audit")
    output: made("audit")
    params: job=path_of("audit")
    log: log_of("audit")
    shell: CALL


rule release:
    input: needs("release")
    output: made("release")
    params: job=path_of("release")
    log: log_of("release")
    shell: CALL


rule spectrum:
    input: needs("spectrum")
    output: made("spectrum")
    params: job=path_of("spectrum")
    log: log_of("spectrum")
    resources: gpu=CARDS
    priority: 5
    shell: CALL


rule range:
    input: needs("range")
    output: made("range")
    params: job=path_of("range")
    log: log_of("range")
    shell: CALL


rule arms:
    input: needs("arms")
    output: made("arms")
    params: job=path_of("arms")
    log: log_of("arms")
    shell: CALL


rule landscape:
    input: needs("landscape")
    output: made("landscape")
    params: job=path_of("landscape")
    log: log_of("landscape")
    resources: gpu=CARDS
    shell: CALL


rule attribution:
    input: needs("attribution")
    output: made("attribution")
    params: job=path_of("attribution")
    log: log_of("attribution")
    resources: gpu=CARDS
    shell: CALL


rule matrix:
    input: needs("matrix")
    output: made("matrix")
    params: job=path_of("matrix")
    log: log_of("matrix")
    resources: gpu=CARDS
    shell: CALL


rule timeline:
    input: needs("timeline")
    output: made("timeline")
    params: job=path_of("timeline")
    log: log_of("timeline")
    resources: gpu=CARDS
    shell: CALL


rule carriers:
    input: needs("carriers")
    output: made("carriers")
    params: job=path_of("carriers")
    log: log_of("carriers")
    shell: CALL


rule annealing:
    input: needs("annealing")
    output: made("annealing")
    params: job=path_of("annealing")
    log: log_of("annealing")
    resources: gpu=CARDS
    shell: CALL


rule behaviour:
    input: needs("behaviour")
    output: made("behaviour")
    params: job=path_of("behaviour")
    log: log_of("behaviour")
    shell: CALL


rule conduct:
    input: needs("conduct")
    output: made("conduct")
    params: job=path_of("conduct")
    log: log_of("conduct")
    shell: CALL


rule own_model:
    input: needs("own_model")
    output: made("own_model")
    params: job=path_of("own_model")
    log: log_of("own_model")
    resources: gpu=CARDS
    shell: CALL


# ---- steerable
rule synthetic:
    input: needs("synthetic")
    output: made("synthetic")
    params: job=path_of("synthetic")
    log: log_of("synthetic")
    shell: CALL


rule answers:
    input: needs("answers")
    output: made("answers")
    params: job=path_of("answers")
    log: log_of("answers")
    resources: gpu=CARDS
    shell: CALL


rule prompted:
    input: needs("prompted")
    output: made("prompted")
    params: job=path_of("prompted")
    log: log_of("prompted")
    shell: CALL


rule pluralism:
    input: needs("pluralism")
    output: made("pluralism")
    params: job=path_of("pluralism")
    log: log_of("pluralism")
    resources: gpu=CARDS
    shell: CALL


rule probes:
    input: needs("probes")
    output: made("probes")
    params: job=path_of("probes")
    log: log_of("probes")
    resources: gpu=CARDS
    shell: CALL


rule faithfulness:
    input: needs("faithfulness")
    output: made("faithfulness")
    params: job=path_of("faithfulness")
    log: log_of("faithfulness")
    resources: gpu=CARDS
    shell: CALL


rule moderation:
    input: needs("moderation")
    output: made("moderation")
    params: job=path_of("moderation")
    log: log_of("moderation")
    resources: gpu=CARDS
    shell: CALL


# ---- what a reader opens
rule report:
    input: needs("report")
    output: f"{OUT}/{{study}}/report/run.json"
    params: job=path_of("report")
    log: f"{OUT}/log/{{study}}-report.log"
    shell: CALL


rule companion:
    input: RUNS, COMPANION_KEY
    output: f"{OUT}/companion/index.html"
    params: overrides=shlex.quote(OVERRIDES), studies=",".join(STUDIES)
    log: f"{OUT}/log/companion.log"
    shell: f"{sys.executable} -m valuecot.companion.pages {PROFILE} {{params.overrides}} 2> {{log}} && {sys.executable} -m valuecot.flow.plan {PROFILE} {{params.studies}} {{params.overrides}}"
