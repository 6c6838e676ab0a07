"""The colours that annotation tools give to classes."""


def colour_of(value: int) -> tuple[int, int, int]:
    """Pascal VOC's colour of a class id: black for 0, (224, 224, 192) for 255, the boundary that is not scored.

    Everingham et al., The PASCAL Visual Object Classes Challenge, development kit, VOClabelcolormap.m.
    """
    colour = [0, 0, 0]
    for shift in range(7, -1, -1):
        for channel in range(3):
            colour[channel] |= ((value >> channel) & 1) << shift
        value >>= 3
    return colour[0], colour[1], colour[2]
