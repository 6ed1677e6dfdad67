"""Do experts pay, and is it known when? Zoos of experts by cluster beside one universal model, where tasks differ.

    python benchmarks/experts run --files DATA --out runs/experts    # twice, to use two cores
    python benchmarks/experts report --files DATA --out runs/experts
    # benchmarks/results/cpu/experts_<world>.json, and each seed's journal beside it

DATA holds image folders (or tars of them), CIFAR-100's parts and weights, as named in ``WORLDS``. One unit is a task in
one world under one training seed; what is finished is kept in a journal, and the same command goes on from there (also
from a committed journal, unpacked to OUT/<world>/seed<seed>/journal.jsonl).

A training seed draws which classes of each domain are hidden and which domains are held out, makes the base, the
universal model and the experts anew, and draws the tasks, each with few images of a class and with more (``IMAGES``).
Asked, before any of these seeds was run (``QUESTIONS``): is the default better than universal on known classes, also
where that has a head of what it knows of the classes, and is it not worse by a point on hidden classes and on domains
that nobody saw? Superiority is corrected over these questions (Holm), non-inferiority has an uncorrected 95 % interval.
Everything else is exploratory: what was run in one world under one seed alone (``Arm.part``) above all.

A first edition, of seeds 0, 1 and 2, is kept (``experts_diverse-first``): on 6 of its 48 tasks of hidden classes with
few images an expert took classes that look alike for its own, at a cost of 4 points. How an expert is heard was chosen
anew after that, on seeds 100 and 101, and the questions are asked again under seeds that nobody had seen.
"""
