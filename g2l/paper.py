"""The paper's own figures (arXiv 2510.11176, Tables 1 to 3), as printed, to stand beside ours.

A block is a table: what is measured and the models, then a row per benchmark, in Table 3 per k.
uni2-h is the paper's UNI-v2. BreakHis in Table 2 is the mean over magnifications, without a ±.
"""

TEXT = """
cka           hibou-l      G2L
bracs         0.7594±0.014 0.9683±0.011
breakhis-40x  0.8909±0.003 0.9558±0.001
breakhis-100x 0.9147±0.002 0.9686±0.001
breakhis-200x 0.9230±0.001 0.9734±0.000
breakhis-400x 0.8995±0.003 0.9575±0.000

knn              h-optimus-0   uni2-h        virchow       hibou-l       uni           G2L
tils             0.9344±0.006  0.9291±0.007  0.8900±0.007  0.9214±0.008  0.9334±0.007  0.9362±0.005
tp53             0.6598±0.040  0.6542±0.050  0.6528±0.030  0.6504±0.030  0.6331±0.020  0.6904±0.050
idc              0.9141±0.0003 0.9165±0.0003 0.8813±0.0004 0.9074±0.0003 0.9224±0.0003 0.9232±0.0001
bracs            0.4526±0.030  0.4638±0.020  0.3677±0.030  0.4103±0.040  0.4305±0.040  0.4520±0.040
breakhis-binary  0.8892        0.8742        0.8102        0.8393        0.8718        0.8841
breakhis-subtype 0.5259        0.5502        0.4040        0.4660        0.5105        0.5319
gleason          0.8994±0.002  0.8678±0.003  0.6162±0.003  0.8124±0.002  0.8798±0.002  0.8988±0.001
aggc             0.9226±0.001  0.9170±0.001  0.7540±0.002  0.8788±0.001  0.9194±0.001  0.9243±0.001
chimera          0.7663±0.070  0.7605±0.060  0.7368±0.057  0.7184±0.072  0.7394±0.071  0.7657±0.050

probe            h-optimus-0   uni2-h        virchow       hibou-l       uni           G2L
tils             0.9822±0.003  0.9788±0.004  0.9819±0.003  0.9827±0.002  0.9782±0.004  0.9838±0.002
tp53             0.7603±0.052  0.6795±0.054  0.7138±0.070  0.7085±0.076  0.7317±0.066  0.8046±0.048
idc              0.9778±0.0008 0.9756±0.001  0.9488±0.002  0.9488±0.002  0.9770±0.0009 0.9796±0.0009
bracs            0.8226±0.019  0.8489±0.025  0.7943±0.030  0.7809±0.019  0.8146±0.025  0.8156±0.029
breakhis-binary  0.9578        0.9630        0.9471        0.9415        0.9657        0.9626
breakhis-subtype 0.8436        0.8711        0.7653        0.8033        0.8226        0.8465
gleason          0.9846±0.0008 0.9790±0.001  0.9721±0.001  0.9708±0.001  0.9774±0.001  0.9841±0.001
aggc             0.9955±0.0001 0.9956±0.0002 0.9939±0.0002 0.9921±0.0002 0.9951±0.0001 0.9958±0.0002
chimera          0.8451±0.090  0.8653±0.106  0.7980±0.092  0.8173±0.081  0.8572±0.079  0.8520±0.103

index h-optimus-0 uni2-h      virchow     uni         hibou-l     G2L
3     1.0826±0.03 1.0682±0.03 1.0137±0.04 1.0701±0.04 0.9056±0.03 1.0891±0.02
5     1.1890±0.04 1.2433±0.05 1.1006±0.03 1.1460±0.02 0.9905±0.02 1.3002±0.10
10    1.3730±0.07 1.4113±0.05 1.1351±0.04 1.4110±0.04 1.0879±0.01 1.5021±0.06
20    1.8467±0.12 1.8548±0.10 1.2850±0.07 1.7811±0.07 1.1855±0.08 2.0316±0.09
"""


def parse(text: str) -> dict[tuple[str, str, str], str]:
    """{(measure, benchmark or k, model): "0.7594 ± 0.014"} of text such as TEXT."""
    figures = {}
    for block in text.strip().split("\n\n"):
        head, *rows = map(str.split, block.splitlines())
        for row, *values in rows:
            for model, value in zip(head[1:], values, strict=True):
                figures[head[0], row, model] = value.replace("±", " ± ")
    return figures


FIGURES = parse(TEXT)


def paper_name(model: str, metadata: dict) -> str:
    """What the paper calls a model: G2L if it is Hibou-L distilled from H-optimus-0."""
    pair = metadata.get("teacher"), metadata.get("student")
    return "G2L" if pair == ("h-optimus-0", "hibou-l") else model


def paper_figure(measured: str, row: str, model: str, metadata: dict) -> str:
    """The paper's figure for a model in a table's row, to go behind ours; empty without one."""
    figure = FIGURES.get((measured, row, paper_name(model, metadata)))
    return f" (paper {figure})" if figure else ""
