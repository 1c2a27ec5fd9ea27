from derta.evaluation.attacks import Attacks as Attacks
from derta.evaluation.defences import Defence as Defence
from derta.evaluation.evaluate import (
    Answered as Answered,
    EvaluationSettings as EvaluationSettings,
    collect_answers as collect_answers,
    evaluate_model as evaluate_model,
    judge_answers as judge_answers,
)
from derta.evaluation.generation.answers import AnswerFile as AnswerFile, fingerprint as fingerprint
from derta.evaluation.generation.decoding import Decoding as Decoding
from derta.evaluation.generation.local import ModelGenerator as ModelGenerator, generate as generate
from derta.evaluation.generation.server import (
    Server as Server,
    ServerGenerator as ServerGenerator,
    ServerSettings as ServerSettings,
)
from derta.evaluation.judges.base import (
    Exchange as Exchange,
    Judge as Judge,
    KeywordJudge as KeywordJudge,
    Verdict as Verdict,
)
from derta.evaluation.judges.calibration import (
    calibrate as calibrate,
    read_labelled as read_labelled,
)
from derta.evaluation.judges.local import (
    ClassifierJudge as ClassifierJudge,
    ModelJudge as ModelJudge,
)
from derta.evaluation.judges.rubrics import (
    RUBRICS as RUBRICS,
    Rubric as Rubric,
    paper_rubric as paper_rubric,
)
from derta.evaluation.judges.served import ServerJudge as ServerJudge
from derta.evaluation.measures.curve import (
    detector_auc as detector_auc,
    forced_rates as forced_rates,
    mean_curve as mean_curve,
)
from derta.evaluation.measures.ranks import RankAttack as RankAttack
from derta.evaluation.measures.results import (
    Outcome as Outcome,
    VariantResult as VariantResult,
    pool as pool,
    summarize as summarize,
)
from derta.evaluation.measures.statistics import (
    newcombe_interval as newcombe_interval,
    roc_auc as roc_auc,
    wilson_interval as wilson_interval,
)
from derta.evaluation.reporting.comparison import (
    compare as compare,
    format_comparison as format_comparison,
    write_comparison as write_comparison,
)
from derta.evaluation.reporting.report import (
    format_table as format_table,
    format_undecided as format_undecided,
    write_report as write_report,
)
from derta.evaluation.scenarios import (
    EvaluationData as EvaluationData,
    Scenario as Scenario,
    Trial as Trial,
    make_scenarios as make_scenarios,
)
from derta.evaluation.teacher_forcing import (
    ResponseCurves as ResponseCurves,
    find_refusal_token as find_refusal_token,
    perplexity as perplexity,
    refusal_curve as refusal_curve,
    refusal_curves as refusal_curves,
    response as response,
    response_curve as response_curve,
    response_curves as response_curves,
)
