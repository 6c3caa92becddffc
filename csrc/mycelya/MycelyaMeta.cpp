// Copyright (C) 2025 alyxya
// SPDX-License-Identifier: AGPL-3.0-or-later
//
// Structured ops whose metadata function is called directly. The dispatcher's
// Meta key leads to a function written in Python for most of them: 60 to 120
// us, where these take about one (D3).
#include <ATen/MetaFunctions.h>
#include <ATen/Operators.h>

#include "MycelyaSignature.h"

namespace mycelya {
namespace {

using Table = std::unordered_map<std::string, c10::KernelFunction>;

void add(Table& table, const std::string& name, const char* overload,
         c10::KernelFunction kernel) {
  auto full = *overload == '\0' ? name : name + "." + overload;
  table.emplace(std::move(full), std::move(kernel));
}

template <class Schema>
c10::KernelFunction kernel(Schema* function) {
  return c10::KernelFunction::makeFromUnboxedRuntimeFunction(function);
}

// `op` names the schema, which also picks the overload of at::meta::`function`.
#define MYCELYA_META(op, function)                            \
  add(table, at::_ops::op::name, at::_ops::op::overload_name, \
      kernel<at::_ops::op::schema>(&at::meta::function))

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Scale = std::optional<double>;

// Ops whose schema has symbolic integers: at::meta has them with plain ones.
void add_with_sizes(Table& table) {
  add(table, "aten::tril", "",
      kernel<Tensor(const Tensor&, int64_t)>(&at::meta::tril));
  add(table, "aten::triu", "",
      kernel<Tensor(const Tensor&, int64_t)>(&at::meta::triu));
  add(table, "aten::topk", "",
      kernel<std::tuple<Tensor, Tensor>(const Tensor&, int64_t, int64_t, bool,
                                        bool)>(&at::meta::topk));
  add(table, "aten::nll_loss_forward", "",
      kernel<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&,
                                        const OptionalTensor&, int64_t,
                                        int64_t)>(&at::meta::nll_loss_forward));
  add(table, "aten::nll_loss_backward", "",
      kernel<Tensor(const Tensor&, const Tensor&, const Tensor&,
                    const OptionalTensor&, int64_t, int64_t, const Tensor&)>(
          &at::meta::nll_loss_backward));
  add(table, "aten::upsample_nearest2d", "",
      kernel<Tensor(const Tensor&, at::IntArrayRef, Scale, Scale)>(
          &at::meta::upsample_nearest2d));
  add(table, "aten::upsample_bilinear2d", "",
      kernel<Tensor(const Tensor&, at::IntArrayRef, bool, Scale, Scale)>(
          &at::meta::upsample_bilinear2d));
}

void add_first_half(Table& table) {
  MYCELYA_META(add_Tensor, add);
  MYCELYA_META(add__Tensor, add_);
  MYCELYA_META(sub_Tensor, sub);
  MYCELYA_META(sub__Tensor, sub_);
  MYCELYA_META(mul_Tensor, mul);
  MYCELYA_META(mul__Tensor, mul_);
  MYCELYA_META(div_Tensor, div);
  MYCELYA_META(div__Tensor, div_);
  MYCELYA_META(div_Tensor_mode, div);
  MYCELYA_META(div__Tensor_mode, div_);
  MYCELYA_META(mm, mm);
  MYCELYA_META(bmm, bmm);
  MYCELYA_META(addmm, addmm);
  MYCELYA_META(addmm_, addmm_);
  MYCELYA_META(baddbmm, baddbmm);
  MYCELYA_META(baddbmm_, baddbmm_);
  MYCELYA_META(addmv, addmv);
  MYCELYA_META(addmv_, addmv_);
  MYCELYA_META(_softmax, _softmax);
  MYCELYA_META(_softmax_backward_data, _softmax_backward_data);
  MYCELYA_META(_log_softmax, _log_softmax);
  MYCELYA_META(_log_softmax_backward_data, _log_softmax_backward_data);
  MYCELYA_META(silu, silu);
  MYCELYA_META(silu_, silu_);
  MYCELYA_META(silu_backward, silu_backward);
  MYCELYA_META(gelu, gelu);
  MYCELYA_META(gelu_, gelu_);
  MYCELYA_META(gelu_backward, gelu_backward);
  MYCELYA_META(neg, neg);
  MYCELYA_META(neg_, neg_);
  MYCELYA_META(rsqrt, rsqrt);
  MYCELYA_META(rsqrt_, rsqrt_);
  MYCELYA_META(sqrt, sqrt);
  MYCELYA_META(sqrt_, sqrt_);
  MYCELYA_META(cos, cos);
  MYCELYA_META(cos_, cos_);
  MYCELYA_META(sin, sin);
  MYCELYA_META(sin_, sin_);
  MYCELYA_META(tan, tan);
  MYCELYA_META(tan_, tan_);
  MYCELYA_META(tanh, tanh);
  MYCELYA_META(tanh_, tanh_);
  MYCELYA_META(tanh_backward, tanh_backward);
  MYCELYA_META(sigmoid, sigmoid);
  MYCELYA_META(sigmoid_, sigmoid_);
  MYCELYA_META(sigmoid_backward, sigmoid_backward);
  MYCELYA_META(exp, exp);
  MYCELYA_META(exp_, exp_);
  MYCELYA_META(exp2, exp2);
  MYCELYA_META(exp2_, exp2_);
  MYCELYA_META(expm1, expm1);
  MYCELYA_META(expm1_, expm1_);
  MYCELYA_META(log, log);
  MYCELYA_META(log_, log_);
  MYCELYA_META(log2, log2);
  MYCELYA_META(log2_, log2_);
  MYCELYA_META(log1p, log1p);
  MYCELYA_META(log1p_, log1p_);
  MYCELYA_META(log10, log10);
  MYCELYA_META(log10_, log10_);
  MYCELYA_META(erf, erf);
  MYCELYA_META(erf_, erf_);
  MYCELYA_META(erfc, erfc);
  MYCELYA_META(erfc_, erfc_);
  MYCELYA_META(reciprocal, reciprocal);
  MYCELYA_META(reciprocal_, reciprocal_);
  MYCELYA_META(pow_Tensor_Tensor, pow);
  MYCELYA_META(pow__Tensor, pow_);
  MYCELYA_META(pow_Scalar, pow);
  MYCELYA_META(pow_Tensor_Scalar, pow);
  MYCELYA_META(pow__Scalar, pow_);
  MYCELYA_META(mean_dim, mean);
  MYCELYA_META(sum_dim_IntList, sum);
  MYCELYA_META(prod_dim_int, prod);
  MYCELYA_META(amax, amax);
  MYCELYA_META(amin, amin);
  MYCELYA_META(max_dim, max);
  MYCELYA_META(min_dim, min);
  MYCELYA_META(maximum, maximum);
  MYCELYA_META(minimum, minimum);
  MYCELYA_META(all_dim, all);
  MYCELYA_META(all_dims, all);
  MYCELYA_META(all, all);
  MYCELYA_META(any_dim, any);
  MYCELYA_META(any_dims, any);
  MYCELYA_META(any, any);
  MYCELYA_META(argmax, argmax);
  MYCELYA_META(argmin, argmin);
  MYCELYA_META(eq_Scalar, eq);
  MYCELYA_META(eq__Scalar, eq_);
  MYCELYA_META(eq_Tensor, eq);
  MYCELYA_META(eq__Tensor, eq_);
  MYCELYA_META(ne_Scalar, ne);
  MYCELYA_META(ne__Scalar, ne_);
  MYCELYA_META(ne_Tensor, ne);
  MYCELYA_META(ne__Tensor, ne_);
  MYCELYA_META(lt_Scalar, lt);
  MYCELYA_META(lt__Scalar, lt_);
  MYCELYA_META(lt_Tensor, lt);
  MYCELYA_META(lt__Tensor, lt_);
  MYCELYA_META(le_Scalar, le);
  MYCELYA_META(le__Scalar, le_);
  MYCELYA_META(le_Tensor, le);
  MYCELYA_META(le__Tensor, le_);
  MYCELYA_META(gt_Scalar, gt);
  MYCELYA_META(gt__Scalar, gt_);
  MYCELYA_META(gt_Tensor, gt);
  MYCELYA_META(gt__Tensor, gt_);
  MYCELYA_META(ge_Scalar, ge);
  MYCELYA_META(ge__Scalar, ge_);
  MYCELYA_META(ge_Tensor, ge);
  MYCELYA_META(ge__Tensor, ge_);
  MYCELYA_META(cat, cat);
  MYCELYA_META(clamp, clamp);
  MYCELYA_META(clamp_, clamp_);
  MYCELYA_META(clamp_Tensor, clamp);
  MYCELYA_META(clamp__Tensor, clamp_);
  MYCELYA_META(clamp_min, clamp_min);
  MYCELYA_META(clamp_min_, clamp_min_);
  MYCELYA_META(clamp_min_Tensor, clamp_min);
  MYCELYA_META(clamp_min__Tensor, clamp_min_);
}

void add_second_half(Table& table) {
  MYCELYA_META(clamp_max, clamp_max);
  MYCELYA_META(clamp_max_, clamp_max_);
  MYCELYA_META(clamp_max_Tensor, clamp_max);
  MYCELYA_META(clamp_max__Tensor, clamp_max_);
  MYCELYA_META(ceil, ceil);
  MYCELYA_META(ceil_, ceil_);
  MYCELYA_META(floor, floor);
  MYCELYA_META(floor_, floor_);
  MYCELYA_META(round, round);
  MYCELYA_META(round_, round_);
  MYCELYA_META(round_decimals, round);
  MYCELYA_META(round__decimals, round_);
  MYCELYA_META(trunc, trunc);
  MYCELYA_META(trunc_, trunc_);
  MYCELYA_META(frac, frac);
  MYCELYA_META(frac_, frac_);
  MYCELYA_META(sign, sign);
  MYCELYA_META(sign_, sign_);
  MYCELYA_META(sgn, sgn);
  MYCELYA_META(sgn_, sgn_);
  MYCELYA_META(leaky_relu, leaky_relu);
  MYCELYA_META(leaky_relu_, leaky_relu_);
  MYCELYA_META(leaky_relu_backward, leaky_relu_backward);
  MYCELYA_META(elu, elu);
  MYCELYA_META(elu_, elu_);
  MYCELYA_META(elu_backward, elu_backward);
  MYCELYA_META(softplus, softplus);
  MYCELYA_META(softplus_backward, softplus_backward);
  MYCELYA_META(threshold, threshold);
  MYCELYA_META(threshold_, threshold_);
  MYCELYA_META(threshold_backward, threshold_backward);
  MYCELYA_META(hardsigmoid, hardsigmoid);
  MYCELYA_META(hardsigmoid_, hardsigmoid_);
  MYCELYA_META(mish, mish);
  MYCELYA_META(mish_, mish_);
  MYCELYA_META(addcmul, addcmul);
  MYCELYA_META(addcmul_, addcmul_);
  MYCELYA_META(addcdiv, addcdiv);
  MYCELYA_META(addcdiv_, addcdiv_);
  MYCELYA_META(lerp_Scalar, lerp);
  MYCELYA_META(lerp__Scalar, lerp_);
  MYCELYA_META(lerp_Tensor, lerp);
  MYCELYA_META(lerp__Tensor, lerp_);
  MYCELYA_META(atan2, atan2);
  MYCELYA_META(atan2_, atan2_);
  MYCELYA_META(fmod_Tensor, fmod);
  MYCELYA_META(fmod__Tensor, fmod_);
  MYCELYA_META(remainder_Tensor, remainder);
  MYCELYA_META(remainder__Tensor, remainder_);
  MYCELYA_META(bitwise_and_Tensor, bitwise_and);
  MYCELYA_META(bitwise_and__Tensor, bitwise_and_);
  MYCELYA_META(bitwise_or_Tensor, bitwise_or);
  MYCELYA_META(bitwise_or__Tensor, bitwise_or_);
  MYCELYA_META(bitwise_not, bitwise_not);
  MYCELYA_META(bitwise_not_, bitwise_not_);
  MYCELYA_META(bitwise_xor_Tensor, bitwise_xor);
  MYCELYA_META(bitwise_xor__Tensor, bitwise_xor_);
  MYCELYA_META(cumsum, cumsum);
  MYCELYA_META(cumsum_, cumsum_);
  MYCELYA_META(cumprod, cumprod);
  MYCELYA_META(cumprod_, cumprod_);
  MYCELYA_META(sort_stable, sort);
  MYCELYA_META(gather, gather);
  MYCELYA_META(scatter_src, scatter);
  MYCELYA_META(scatter__src, scatter_);
  MYCELYA_META(scatter_value, scatter);
  MYCELYA_META(scatter__value, scatter_);
  MYCELYA_META(scatter_reduce, scatter);
  MYCELYA_META(scatter__reduce, scatter_);
  MYCELYA_META(scatter_value_reduce, scatter);
  MYCELYA_META(scatter__value_reduce, scatter_);
  MYCELYA_META(scatter_add, scatter_add);
  MYCELYA_META(scatter_add_, scatter_add_);
  MYCELYA_META(index_add, index_add);
  MYCELYA_META(index_add_, index_add_);
  MYCELYA_META(mse_loss, mse_loss);
  MYCELYA_META(smooth_l1_loss, smooth_l1_loss);
  MYCELYA_META(max_pool2d_with_indices, max_pool2d_with_indices);
  MYCELYA_META(max_pool2d_with_indices_backward,
               max_pool2d_with_indices_backward);
  MYCELYA_META(avg_pool2d, avg_pool2d);
  MYCELYA_META(avg_pool2d_backward, avg_pool2d_backward);
  MYCELYA_META(linalg_vector_norm, linalg_vector_norm);
  MYCELYA_META(norm_ScalarOpt_dim_dtype, norm);
  MYCELYA_META(norm_ScalarOpt_dim, norm);
  MYCELYA_META(isin_Tensor_Tensor, isin);
  MYCELYA_META(isin_Tensor_Scalar, isin);
  MYCELYA_META(isin_Scalar_Tensor, isin);
  MYCELYA_META(fmax, fmax);
  MYCELYA_META(fmin, fmin);
  MYCELYA_META(acos, acos);
  MYCELYA_META(acos_, acos_);
  MYCELYA_META(asin, asin);
  MYCELYA_META(asin_, asin_);
  MYCELYA_META(atan, atan);
  MYCELYA_META(atan_, atan_);
  MYCELYA_META(sinh, sinh);
  MYCELYA_META(sinh_, sinh_);
  MYCELYA_META(cosh, cosh);
  MYCELYA_META(cosh_, cosh_);
  MYCELYA_META(xlogy_Tensor, xlogy);
  MYCELYA_META(xlogy__Tensor, xlogy_);
  MYCELYA_META(logaddexp, logaddexp);
  MYCELYA_META(erfinv, erfinv);
  MYCELYA_META(erfinv_, erfinv_);
  MYCELYA_META(lgamma, lgamma);
  MYCELYA_META(lgamma_, lgamma_);
  MYCELYA_META(digamma, digamma);
  MYCELYA_META(digamma_, digamma_);
  MYCELYA_META(hypot, hypot);
  MYCELYA_META(hypot_, hypot_);
  MYCELYA_META(copysign_Tensor, copysign);
  MYCELYA_META(copysign__Tensor, copysign_);
  MYCELYA_META(nextafter, nextafter);
  MYCELYA_META(nextafter_, nextafter_);
  MYCELYA_META(heaviside, heaviside);
  MYCELYA_META(heaviside_, heaviside_);
  MYCELYA_META(hardshrink, hardshrink);
  MYCELYA_META(softshrink, softshrink);
  MYCELYA_META(glu, glu);
  MYCELYA_META(sinc, sinc);
  MYCELYA_META(sinc_, sinc_);
}

Table make_table() {
  Table table;
  add_first_half(table);
  add_second_half(table);
  add_with_sizes(table);
  return table;
}

}  // namespace

const c10::KernelFunction* direct_meta(const std::string& name) {
  static const auto* table = new Table(make_table());
  auto found = table->find(name);
  return found == table->end() ? nullptr : &found->second;
}

}  // namespace mycelya
