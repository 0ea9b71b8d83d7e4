//! Names of the CPU features that CPUID tells, as Linux and the manuals of
//! Intel and AMD have them.

/// A register of a CPUID leaf with one feature in each bit.
pub(super) struct FeatureRegister {
    pub(super) leaf: u32,
    pub(super) index: u32,
    pub(super) register: Register,
    /// Bits that say something of the moment or the topology, not of what the
    /// host can do; or that KVM gives without listing them.
    pub(super) ignored: u32,
    /// From bit 0 on; `-` has no name.
    names: &'static str,
}

/// One of a leaf's four registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    pub(super) fn name(self) -> &'static str {
        match self {
            Register::Eax => "EAX",
            Register::Ebx => "EBX",
            Register::Ecx => "ECX",
            Register::Edx => "EDX",
        }
    }
}

impl FeatureRegister {
    /// What a bit is called; its place where it has no name here.
    pub(super) fn name(&self, bit: u32) -> String {
        let place = format!(
            "CPUID {:#x}.{} {} bit {bit}",
            self.leaf,
            self.index,
            self.register.name()
        );
        match self.names.split_whitespace().nth(bit as usize) {
            Some(name) if name != "-" => format!("{name} ({place})"),
            _ => place,
        }
    }
}

const fn features(
    (leaf, index, register): (u32, u32, Register),
    ignored: u32,
    names: &'static str,
) -> FeatureRegister {
    FeatureRegister {
        leaf,
        index,
        register,
        ignored,
        names,
    }
}

use Register::{Eax, Ebx, Ecx, Edx};

/// All that are compared.
pub(super) const FEATURES: [FeatureRegister; 18] = [
    features(
        (1, 0, Ecx),
        // x2apic, tsc_deadline_timer, osxsave, hypervisor
        1 << 21 | 1 << 24 | 1 << 27 | 1 << 31,
        "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - \
         pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c \
         rdrand hypervisor",
    ),
    features(
        (1, 0, Edx),
        // apic, htt
        1 << 9 | 1 << 28,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - \
         dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    features((6, 0, Eax), 0, "dtherm ida arat - pln - pts hwp"),
    features(
        (7, 0, Ebx),
        0,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm \
         zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt \
         clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    features(
        (7, 0, Ecx),
        1 << 4,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq \
         avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid key_locker \
         bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    ),
    features(
        (7, 0, Edx),
        0,
        "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear \
         rtm_always_abort - tsx_force_abort serialize hybrid tsxldtrk - pconfig arch_lbr ibt - \
         amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl stibp flush_l1d arch_capabilities \
         core_capabilities ssbd",
    ),
    features(
        (7, 1, Eax),
        0,
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs \
         fsrc - - - - fred lkgs wrmsrns nmi_source amx_fp16 hreset avx_ifma - - lam msrlist",
    ),
    features(
        (7, 1, Edx),
        0,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti \
         - - - - avx10",
    ),
    features(
        (7, 2, Edx),
        0,
        "psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no",
    ),
    features(
        (0xd, 0, Eax),
        0,
        "x87_state sse_state avx_state bndregs_state bndcsr_state opmask_state zmm_hi256_state \
         hi16_zmm_state pt_state pkru_state pasid_state cet_u_state cet_s_state hdc_state \
         uintr_state lbr_state hwp_state xtilecfg_state xtiledata_state",
    ),
    features((0xd, 1, Eax), 0, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    features(
        (0x4000_0001, 0, Eax),
        0,
        "kvmclock kvm_nopiodelay kvm_mmu_op kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi \
         kvm_pv_unhalt - kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control \
         kvm_pv_sched_yield kvm_asyncpf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range \
         kvm_migration_control - - - - - - kvmclock_stable",
    ),
    features(
        (0x8000_0001, 0, Ecx),
        0,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs \
         xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext \
         ptsc perfctr_llc mwaitx",
    ),
    features(
        (0x8000_0001, 0, Edx),
        1 << 9,
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - - nx - \
         mmxext mmx fxsr fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    features((0x8000_0007, 0, Edx), 0, "- - - - - - - - constant_tsc"),
    features(
        (0x8000_0008, 0, Ebx),
        0,
        "clzero irperf xsaveerptr - rdpru - - - mcommit wbnoinvd - - ibpb int_wbinvd ibrs stibp \
         ibrs_always_on stibp_always_on ibrs_preferred ibrs_same_mode no_efer_lmsle - - amd_ppin \
         amd_ssbd virt_ssbd amd_ssb_no cppc psfd btc_no ibpb_ret brs",
    ),
    features(
        (0x8000_000a, 0, Edx),
        0,
        "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists - - \
         pausefilter - pfthreshold avic - v_vmsave_vmload vgif",
    ),
    features(
        (0x8000_0021, 0, Eax),
        0,
        "no_nested_data_bp - lfence_always_serializing - - - null_sel_clr_base - auto_ibrs \
         no_smm_ctl_msr - - - - - - - prefetchi - - epsf - - - - - - sbpb ibpb_brtype srso_no",
    ),
];

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn name(leaf: u32, index: u32, register: Register, bit: u32) -> String {
        let of = |f: &&FeatureRegister| (f.leaf, f.index, f.register) == (leaf, index, register);
        FEATURES.iter().find(of).unwrap().name(bit)
    }

    #[test]
    fn well_known_features_stand_in_their_bits() {
        for (leaf, index, register, bit, wanted) in [
            (1, 0, Ecx, 25, "aes "),
            (1, 0, Ecx, 28, "avx "),
            (1, 0, Ecx, 31, "hypervisor "),
            (1, 0, Edx, 26, "sse2 "),
            (7, 0, Ebx, 5, "avx2 "),
            (7, 0, Ebx, 16, "avx512f "),
            (7, 0, Ebx, 31, "avx512vl "),
            (7, 0, Ecx, 3, "pku "),
            (7, 0, Ecx, 16, "la57 "),
            (7, 0, Ecx, 22, "rdpid "),
            (7, 0, Edx, 26, "spec_ctrl "),
            (7, 0, Edx, 24, "amx_tile "),
            (7, 1, Eax, 4, "avx_vnni "),
            (0xd, 0, Eax, 18, "xtiledata_state "),
            (0x4000_0001, 0, Eax, 24, "kvmclock_stable "),
            (0x8000_0001, 0, Ecx, 2, "svm "),
            (0x8000_0001, 0, Edx, 26, "pdpe1gb "),
            (0x8000_0001, 0, Edx, 27, "rdtscp "),
            (0x8000_0001, 0, Edx, 29, "lm "),
            (0x8000_0008, 0, Ebx, 24, "amd_ssbd "),
            (0x8000_0021, 0, Eax, 8, "auto_ibrs "),
        ] {
            let found = name(leaf, index, register, bit);
            assert!(found.starts_with(wanted), "{found} for {wanted}");
        }
        assert_eq!(name(1, 0, Ecx, 16), "CPUID 0x1.0 ECX bit 16");
    }

    #[test]
    fn no_register_has_more_than_32_names() {
        for features in &FEATURES {
            assert!(features.names.split_whitespace().count() <= 32);
        }
    }
}
