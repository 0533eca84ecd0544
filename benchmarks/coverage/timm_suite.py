"""Structurally different models of timm, each the smallest of its family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.coverage.case import Case, images

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["cases"]

_FAMILIES = {
    "residual networks": """
        resnet10t resnet26d resnet33ts resnetblur18 resnetaa34d resnetrs50 seresnet18 skresnet18
        ecaresnet26t gcresnet33ts resnest14d resnext26ts seresnext26d_32x4d resnetv2_18
        resnetv2_50x1_bit resnet50_gn nf_resnet26 nf_seresnet26 nf_regnet_b0 nfnet_f0 eca_nfnet_l0
        res2net50_14w_8s res2next50 legacy_seresnet18 tresnet_m gernet_s test_nfnet
    """,
    "attention in residual networks": """
        bat_resnext26ts botnet26t_256 sebotnet33ts_256 halonet26t haloregnetz_b lambda_resnet26t
        lambda_resnet26rpt_256
    """,
    "other convolutional networks": """
        hrnet_w18_small dla34 dla60_res2net vovnet39a ese_vovnet19b_dw densenet121 densenetblur121d
        dpn48b dpn68 darknet53 cspresnet50 cspdarknet53 cs3darknet_s cs3sedarknet_l selecsls42
        inception_v4 inception_resnet_v2 xception41 xception41p legacy_xception nasnetalarge
        pnasnet5large vgg11 regnetx_002 regnety_002 regnetz_005 regnetv_040 hgnet_tiny hgnetv2_b0
        rdnet_tiny csatv2 inception_v3 cspnext_tiny
    """,
    "mobile networks": """
        ghostnet_050 ghostnetv2_100 ghostnetv3_050 mixnet_s tf_mixnet_s efficientnet_cc_b0_4e
        efficientnet_lite0 tf_efficientnetv2_b0 mobilenetv2_050 mobilenetv3_small_050
        mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium fbnetc_100 fbnetv3_b mnasnet_small
        tinynet_e lcnet_035 hardcorenas_a rexnet_100 repghostnet_050 repvit_m0_9 fasternet_t0
        starnet_s050 shvit_s1 mobilenet_edgetpu_v2_xs lcnetv2_small mobilenetv5_300m
    """,
    "reparametrised networks": "repvgg_a0 mobileone_s0 fastvit_t8 fastvit_sa12 fastvit_mci0",
    "modern convolutional networks": """
        convnext_atto convnextv2_atto convnext_zepto_rms convmixer_768_32 inception_next_atto
        focalnet_tiny_srf mambaout_femto
    """,
    "mixers and pools": """
        mixer_s32_224 resmlp_12_224 gmlp_ti16_224 gmixer_12_224 poolformer_s12 poolformerv2_s12
        caformer_s18 convformer_s18 sequencer2d_s
    """,
    "hybrids": """
        edgenext_xx_small levit_128s levit_conv_128s coatnet_nano_rw_224 coatnext_nano_rw_224
        maxvit_tiny_rw_224 maxvit_rmlp_pico_rw_256 maxxvit_rmlp_nano_rw_256 mobilevit_xxs
        mobilevitv2_050 efficientformer_l1 efficientformerv2_s0 efficientvit_b0 efficientvit_l1
        efficientvit_m0 visformer_tiny convit_tiny coat_tiny coat_lite_tiny nextvit_small
        swiftformer_xs tiny_vit_5m_224 vitamin_small_224 vit_tiny_r_s16_p8_224
        cpubone_nano efficientvim_m1 iformer_t lowformer_b0
    """,
    "hierarchical transformers": """
        swin_tiny_patch4_window7_224 swin_s3_tiny_224 swinv2_tiny_window8_256 swinv2_cr_tiny_ns_224
        twins_pcpvt_small twins_svt_small pvt_v2_b0 nest_tiny gcvit_xxtiny davit_tiny hiera_tiny_224
        hieradet_small mvitv2_tiny
    """,
    "plain transformers": """
        vit_tiny_patch16_224 vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224
        vit_wee_patch16_reg1_gap_256 vit_betwixt_patch16_rope_reg4_gap_256
        vit_dlittle_patch16_reg1_gap_256 vit_small_patch14_reg4_dinov2
        vit_small_plus_patch16_dinov3 vit_base_patch16_siglip_224 vit_base_patch16_xp_224
        samvit_base_patch16_224 naflexvit_base_patch16_gap deit_tiny_distilled_patch16_224
        deit3_small_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224 cait_xxs24_224
        xcit_nano_12_p16_224 crossvit_9_dagger_240 volo_d1_224 tnt_s_patch16_224 pit_ti_224
        pit_ti_distilled_224 deepseek_vit_412m gemma4_vit_167m qwen3_vit_88m
    """,
}
_SIDE = 64
# Window and block sizes, or stems without padding, that need more.
_SIDES = {
    "bat_resnext26ts": 256,
    "halonet26t": 256,
    "haloregnetz_b": 224,
    "efficientformer_l1": 224,
    "crossvit_9_dagger_240": 240,
    "inception_v4": 96,
    "inception_resnet_v2": 96,
    "inception_v3": 96,
    "deepseek_vit_412m": 56,
}


def _builder(name: str, side: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        try:
            return timm.create_model(name, pretrained=False, num_classes=10, img_size=side)
        except TypeError:  # a network for images of any size
            return timm.create_model(name, pretrained=False, num_classes=10)

    return build


def cases() -> list[Case]:
    """All of them."""
    return [
        Case(name, _builder(name, side), images(2, 3, side, side), family=family)
        for family, names in _FAMILIES.items()
        for name in names.split()
        for side in (_SIDES.get(name, _SIDE),)
    ]
