/** Why the kernel did not read the partition table, or did not take a partition. */

import { type Cause, isAttached, isScanned, partitionFault, partitionIsThere, partitionPath } from './evidence.ts'
import { describeHolders } from './holders.ts'
import { notAllowed, inUse } from './causes-shared.ts'

const badPartition: Cause[] = [
  {
    reason: 'bad-partition-table',
    when: (failure) => partitionFault(failure) !== undefined,
    detail: partitionFault,
  },
  { reason: 'bad-partition-table', detail: 'the kernel does not accept that partition' },
]

const noPartition: Cause[] = [
  { reason: 'no-such-device', detail: (failure) => `there is no partition ${failure.asked?.partition?.number ?? ''}` },
]

const partitionOverlaps: Cause = {
  reason: 'overlap',
  detail: 'the partition overlaps with another one',
  hint: 'list the others with partitions()',
}

/** Per call or role, per errno. */
export const PARTITION_CAUSES: Record<string, Record<string, Cause[]>> = {
  'BLKRRPART': {
    EINVAL: [
      { reason: 'not-attached', when: (failure) => !isAttached(failure), detail: 'the device has no backing file' },
      {
        reason: 'bad-partition-table',
        when: isScanned,
        detail: 'the kernel cannot read the partition table',
      },
      {
        reason: 'partscan-off',
        detail: 'the device was attached without partition scan',
        hint: 'attach with partscan: true, or setStatus({ partscan: true })',
      },
    ],
    EACCES: notAllowed,
    EBUSY: [
      { ...inUse, detail: ({ holders }) => (holders?.length ? describeHolders(holders) : 'a partition is in use') },
    ],
    EIO: [{ reason: 'io', detail: 'the partition table could not be read' }],
  },
  'BLKPG add': {
    EACCES: notAllowed,
    EINVAL: badPartition,
    ENXIO: [{ reason: 'no-such-device', detail: 'the device is being detached' }],
    EBUSY: [
      {
        reason: 'device-exists',
        when: partitionIsThere,
        detail: (failure) => `${partitionPath(failure)} exists already`,
      },
      partitionOverlaps,
    ],
  },
  'BLKPG resize': { EACCES: notAllowed, EINVAL: badPartition, ENXIO: noPartition, EBUSY: [partitionOverlaps] },
  'BLKPG delete': {
    EACCES: notAllowed,
    EINVAL: badPartition,
    ENXIO: noPartition,
    EBUSY: [{ ...inUse, detail: (failure) => `${partitionPath(failure)} is in use` }],
  },
}
