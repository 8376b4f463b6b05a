// SPDX-License-Identifier: MIT
// What main.cpp runs, in this order: numbers are drawn one after another.
#pragma once

namespace native {

void test_mean();
void test_cuts();
void test_moments();
void test_expectations();
void test_masks_in_another_order();

}  // namespace native
