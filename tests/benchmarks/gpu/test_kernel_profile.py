"""Kernels of a profile are grouped by name, and summed by group."""

import pytest

from benchmarks.gpu.kernel_profile import GROUPS, Kernel, group_of, summed


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("injected_self_attention_kernel", "attention"),
        ("context_cross_attention_kernel_0", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_relu_f16_128x64_32x6_nn_align8>", "gemm"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "gemm"),
        ("triton_tem_fused_addmm_0", "gemm"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_cudnn", "conv"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__half>", "conv"),
        ("triton_red_fused_native_group_norm_silu_3", "norm"),
        ("triton_per_fused_native_layer_norm_12", "norm"),
        # The pointwise kernel after a convolution adds its bias, and is no convolution itself.
        ("triton_poi_fused_add_convolution_7", "other"),
        ("triton_red_fused_mean_1", "other"),
        ("Memcpy DtoD (Device -> Device)", "other"),
        ("aten::mkldnn_convolution", "conv"),
    ],
)
def test_the_group_of_a_kernel(name, group):
    assert group_of(name) == group


def test_a_step_is_summed_up_by_group():
    kernels = [Kernel("nvjet_a", 2.0, 300.0), Kernel("flash_b", 1.0, 100.0), *[Kernel("x", 1.0, 0.0)] * 30]
    found = summed(kernels)
    assert (found["launches"], found["milliseconds"]) == (33.0, 0.4)
    assert set(found["groups"]) == set(GROUPS)
    assert found["groups"]["gemm"] == {"launches": 2.0, "milliseconds": 0.3, "share": 0.75}
    assert found["groups"]["conv"]["share"] == 0.0
    assert len(found["slowest"]) == 20
    assert found["slowest"][0] == {"name": "nvjet_a", "group": "gemm", "launches": 2.0, "microseconds": 300.0}
    assert summed([])["groups"]["other"]["share"] == 0.0
