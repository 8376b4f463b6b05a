// SPDX-License-Identifier: MIT
// What the schemas of ops share.
#pragma once

// Arguments of every forward and of every backward, behind those of its own. A gradient that is not needed is returned
// undefined, None to Python, as those of torch's own convolution_backward are: a tensor of nothing takes as long as one.
#define KPFUSED_SETTINGS "Tensor? beta, float beta_value, int coordinates"
#define KPFUSED_PIXELS "Tensor? mask=None, Tensor? valid_size=None, float? empty_value=None"
#define KPFUSED_FORWARD(returns) "(Tensor heatmap, " KPFUSED_SETTINGS ", " KPFUSED_PIXELS ") -> (" returns ")"
#define KPFUSED_BACKWARD(gradients, kept)                                                                         \
  "(" gradients ", Tensor heatmap, " kept ", " KPFUSED_SETTINGS ", bool needs_grad_beta, " KPFUSED_PIXELS ") -> " \
  "(Tensor grad_heatmap, Tensor grad_beta)"
// Of moments, of maps and of volumes.
#define KPFUSED_MOMENTS \
  "Tensor mean, Tensor covariance, Tensor entropy, Tensor logsumexp, Tensor peak, Tensor peak_probability"
#define KPFUSED_MOMENT_GRADIENTS                                                                                  \
  "Tensor? grad_mean, Tensor? grad_covariance, Tensor? grad_entropy, Tensor? grad_logsumexp, " \
  "Tensor? grad_peak_probability"
