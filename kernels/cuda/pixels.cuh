// Pixels of images, counted through.
#pragma once
#include <indices.cuh>

// Image, row and column of a pixel, counted through (batch, height, width).
struct Pixel {
    long long image;
    int row, column;

    DEVICE Pixel(long long number, int height, int width) {
        const long long rows = quotient(number, width);
        image = quotient(rows, height);
        row = int(rows - image * height);
        column = int(number - rows * width);
    }
};

// Three digits of a mixed base, such as (image, row, column), that count on by one fixed step.
struct Digits {
    int outer, middle, inner;
    int middle_base, inner_base;
    int outer_step, middle_step, inner_step;

    DEVICE Digits(long long value, int step, int middle_base, int inner_base)
        : middle_base(middle_base), inner_base(inner_base) {
        const Pixel digits(value, middle_base, inner_base);
        outer = int(digits.image);
        middle = digits.row;
        inner = digits.column;
        outer_step = step / inner_base / middle_base;
        middle_step = step / inner_base % middle_base;
        inner_step = step % inner_base;
    }

    DEVICE void advance() {
        inner += inner_step;
        middle += middle_step;
        outer += outer_step;
        if (inner >= inner_base) {
            inner -= inner_base;
            ++middle;
        }
        if (middle >= middle_base) {
            middle -= middle_base;
            ++outer;
        }
    }
};
