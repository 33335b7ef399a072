"""The memory of SmolLM2-135M-Instruct that comes with this package: four minutes on an H200, then seven hours on a CPU.

    pip install gensim
    python -m train.data.books out/texts
    python -c "from pydoc_data.topics import topics as t; print(*map(t.get, sorted(t)), sep=2 * chr(10))" \
        > out/texts/python.txt
    python -c "import inspect, numpy; rooms = numpy, numpy.linalg, numpy.fft, numpy.random, numpy.ma; \
        print(*dict.fromkeys(inspect.getdoc(x) or '' for room in rooms for x in vars(room).values() if callable(x)), \
        sep=2 * chr(10))" > out/texts/numpy.txt
    python -c "import bz2, gensim.corpora.wikicorpus as w, gensim.test.utils as u; name = \
        'enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2'; pages = \
        w.extract_pages(bz2.open(u.datapath(name)), ('0',)); print(*(title + 2 * chr(10) + w.filter_wiki(text).strip() \
        for title, text, _ in pages if len(text) > 1000), sep=2 * chr(10))" > out/texts/wikipedia.txt
    python -m train.curriculum configs/smollm2_memory.py --texts out/texts --out out/smollm2 \
        --card configs/smollm2_memory.md

13.3 million tokens of 72 plays and poems, and in the last stages of technical texts and encyclopaedia articles. Most
rows of the first stages are lessons (`train/data/lessons.py`): short rows full of facts at the smallest window, then
longer ones with lists, variables, quotations and prose, at windows drawn anew each step. Cross-entropy on the answers,
in nats, at the first and the last tenth of each stage, the original's beside it, and tokens per second:

    stage                        first   last   original   tokens/s
    1    250 x 32 x   320         3.99   0.04       0.75     89,000
    2    250 x 24 x 1,024         2.72   0.73       0.98     93,000
    3     80 x  8 x 4,096         2.90   1.55       1.94     62,000
    4     90 x  2 x 1,024         1.55   0.84       1.16         69  (2 cores, float32)
    5    150 x  1 x 2,048         1.67   2.28       1.40        120  (2 cores, bfloat16; means over 9 or 10 lessons)
    6    140 x  1 x 2,048         1.58   0.98       1.88         90  (2 cores, float32; means over 10 lessons)
    7     26 x  1 x 4,096             1.68          2.76         82  (2 cores, float32; the mean of all 10 lessons)
    8    330 x  1 x 1,024         1.32   1.42       1.36         86  (2 cores, float32; means over 10 lessons)
    9     26 x  1 x 4,096             2.38          1.78         85  (2 cores, float32; the mean of all 12 lessons)
    10    70 x  1 x 2,048             1.43          1.76         88  (2 cores, float32; the mean of all 15 lessons)
    11    40 x  1 x 4,096             1.40          2.35         81  (2 cores, float32; the mean of all 17 lessons)
    12   100 x  1 x 2,048         2.65   2.05       0.82         89  (2 cores, float32; means over 10 quotations)
    13    14 x  1 x 4,096             1.89          2.89         84  (2 cores, float32; the mean of all 3 lessons)

Every stage starts from the memory before it with a new optimiser. The first three took 216 seconds, of which 135 were
steps (the first of each stage, which compiles, not counted); they were run before reads had a floor, with tokens
written as they come. Before the fourth, which writes them as they leave the window, each floor was set by hand to three
times the median of what its head finds in six of the training texts; run from here, the start sets it. From the fifth
on most rows are prose, with a loss where a key has left the window, which brings the model nearer to the original than
its window alone does; Python's documentation came in with the fifth, NumPy's and the articles with the sixth. What the
fifth left filled up on long prompts, so the sixth starts with all that is written halved (from the int8 file that was
released then); the seventh, on rows twice as long, makes 8,000 tokens safe again (docs/results.md has the
measurements). The eighth, many short steps that take the loss at every position, and the ninth, long rows once more,
start from the seventh's int8 file; they fill long prompts up again, so the tenth starts from the ninth's int8 file with
all that is written halved, and after the eleventh no other halving is needed. The twelfth, whose lessons are quotations
alone, and the thirteenth start from the eleventh's int8 file; what ships is the average of both, seven parts of the
thirteenth's and three of the eleventh's. What the whole gives in one go has not been measured.
configs/smollm2_memory.md is the model card: what the memory does, and what it costs.
"""

from train.recipe import FinetuneConfig

config = FinetuneConfig(
    model=".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf",
    start="attention",
    read_out="difference",
    alpha_init=0.1,
    sinks=(4, 4),
    chunk=(64,),
    positions=0.25,
    inside_weight=4.0,
    dtype="bfloat16",
    backbone_dtype="bfloat16",
    remat="none",
    checkpoint_every=1000,
    log_every=10,
)

prose = dict(batch=1, window=(128, 512), lessons=0.3, answer_weight=0.5, delay=True, positions=0.5,
             beyond_window=True, inside_weight=1.0)  # fmt: skip
stages = (
    dict(steps=250, batch=32, seq_length=320, window=(64, 64), lessons=0.9, kinds=("facts",), answer_weight=2.0,
         learning_rate=2e-3, warmup=10, decay=0.2),
    dict(steps=250, batch=24, seq_length=1024, window=(64, 256), lessons=0.6, answer_weight=1.0,
         learning_rate=1e-3, warmup=10, decay=0.2),
    dict(steps=80, batch=8, seq_length=4096, window=(128, 512), lessons=0.5, answer_weight=0.5,
         learning_rate=1e-3, warmup=10, decay=0.5),
    dict(steps=90, batch=2, seq_length=1024, window=(128, 512), lessons=0.5, answer_weight=0.5, delay=True,
         learning_rate=5e-4, warmup=2, decay=0.7, seed=3),
    prose | dict(steps=150, seq_length=2048, learning_rate=1e-3, warmup=5, decay=0.6, seed=5),
    prose | dict(steps=140, seq_length=2048, learning_rate=1e-3, warmup=5, decay=0.6, seed=6, write_strength=0.5),
    prose | dict(steps=26, seq_length=4096, learning_rate=5e-4, warmup=3, decay=0.8, seed=7),
    prose | dict(steps=330, seq_length=1024, window=(128, 384), lessons=0.2, positions=1.0,
                 learning_rate=1e-3, warmup=5, decay=0.6, seed=8),
    prose | dict(steps=26, seq_length=4096, learning_rate=5e-4, warmup=3, decay=0.8, seed=9),
    prose | dict(steps=70, seq_length=2048, window=(128, 384), lessons=0.2, positions=1.0,
                 learning_rate=7e-4, warmup=4, decay=0.6, seed=10, write_strength=0.5),
    prose | dict(steps=40, seq_length=4096, positions=0.7, learning_rate=5e-4, warmup=3, decay=0.8, seed=11),
    prose | dict(steps=100, seq_length=2048, window=(128, 384), lessons=0.6, kinds=("quotes",), positions=1.0,
                 learning_rate=1e-3, warmup=4, decay=0.6, seed=12),
    prose | dict(steps=14, seq_length=4096, lessons=0.4, positions=0.7, learning_rate=5e-4, warmup=3, decay=0.8,
                 seed=13, average=(11, 0.3)),
)  # fmt: skip
