"""How the layers run fast: C++ on a CPU, Triton on a GPU, chosen by ``dispatch.py``."""
